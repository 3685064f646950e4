/* Element types and reductions: what combines the ranks' operands, always in rank order. */
#pragma once
#include <string.h>

#include "_native_types.h"

static const int ITEM[DTYPES] = {1, 1, 2, 4, 8, 2, 2, 4, 8, 1};

INLINE float bf16_to_f32(uint16_t b) {
  uint32_t u = (uint32_t)b << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}
INLINE uint16_t f32_to_bf16(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  uint32_t rounded = (u + 0x7fff + (u >> 16 & 1)) >> 16;
  return f != f ? 0x7fc0 : (uint16_t)rounded;
}
/* By bits and without branches, so that loops over them become vector code everywhere. */
INLINE float f16_to_f32(uint16_t h) {
  const uint32_t tiny_bits = 113u << 23;
  uint32_t u = (uint32_t)(h & 0x7fff) << 13, e = u & 0x0f800000, sign = (uint32_t)(h & 0x8000) << 16;
  float tiny, bias, f;
  u += 112u << 23;
  uint32_t special = u + (112u << 23), small = u + (1u << 23);
  memcpy(&bias, &tiny_bits, 4);
  memcpy(&tiny, &small, 4);
  tiny -= bias; /* a subnormal: exact */
  memcpy(&small, &tiny, 4);
  u = e == 0x0f800000 ? special : e == 0 ? small : u;
  u |= sign;
  memcpy(&f, &u, 4);
  return f;
}
INLINE uint16_t f32_to_f16(float f) {
  const uint32_t half_bits = 0x3f000000;
  uint32_t u, small;
  memcpy(&u, &f, 4);
  uint32_t sign = u >> 16 & 0x8000, magnitude = u & 0x7fffffff;
  float x, half;
  memcpy(&x, &magnitude, 4);
  memcpy(&half, &half_bits, 4);
  x += half; /* rounds to a multiple of 2^-24, half to even */
  memcpy(&small, &x, 4);
  small -= half_bits;
  uint32_t normal = (magnitude + 0xc8000fff + (magnitude >> 13 & 1)) >> 13;
  uint32_t special = magnitude > 0x7f800000 ? 0x7e00 : 0x7c00;
  return (uint16_t)(sign | (magnitude >= 0x477ff000 ? special : magnitude < 0x38800000 ? small : normal));
}

#define BLOCK 1024 /* elements that are combined at a time: all operands of it stay in cache */

/* `out` may be one of the operands. Always ((x0 . x1) . x2) . ..., in the wider type A. */
#define LOOP _Pragma("GCC ivdep") for (int64_t i = 0; i < m; i++)
#define FOLD(T, A, LOAD, STORE, EXPR, FINISH)                                                                 \
  do {                                                                                                        \
    A acc[BLOCK];                                                                                             \
    for (int64_t at = 0; at < n; at += BLOCK) {                                                               \
      int64_t m = n - at < BLOCK ? n - at : BLOCK;                                                            \
      T *o = (T *)out + at;                                                                                   \
      const T *x0 = (const T *)in[0] + at, *x1 = (const T *)in[1] + at, *last = (const T *)in[world - 1] + at;\
      if (world == 2) {                                                                                       \
        LOOP {                                                                                                \
          A a = LOAD(x0[i]), b = LOAD(x1[i]), r = (EXPR);                                                     \
          FINISH;                                                                                             \
          o[i] = STORE(r);                                                                                    \
        }                                                                                                     \
        continue;                                                                                             \
      }                                                                                                       \
      LOOP {                                                                                                  \
        A a = LOAD(x0[i]), b = LOAD(x1[i]);                                                                   \
        acc[i] = (EXPR);                                                                                      \
      }                                                                                                       \
      for (int rank = 2; rank < world - 1; rank++) {                                                          \
        x1 = (const T *)in[rank] + at;                                                                        \
        LOOP {                                                                                                \
          A a = acc[i], b = LOAD(x1[i]);                                                                      \
          acc[i] = (EXPR);                                                                                    \
        }                                                                                                     \
      }                                                                                                       \
      LOOP {                                                                                                  \
        A a = acc[i], b = LOAD(last[i]), r = (EXPR);                                                          \
        FINISH;                                                                                               \
        o[i] = STORE(r);                                                                                      \
      }                                                                                                       \
    }                                                                                                         \
    return;                                                                                                   \
  } while (0)

#define AS_IS(x) (x)
#define NOTHING (void)0
/* a NaN on either side stays */
#define LESS ((a < b || a != a) ? a : b)
#define MORE ((a > b || a != a) ? a : b)

#define FLOATS(T, A, LOAD, STORE)                                                              \
  switch (reduction) {                                                                         \
    case SUM: FOLD(T, A, LOAD, STORE, a + b, NOTHING);                                         \
    case AVG: FOLD(T, A, LOAD, STORE, a + b, r = r / (A)world);                                \
    case MIN: FOLD(T, A, LOAD, STORE, LESS, NOTHING);                                          \
    case MAX: FOLD(T, A, LOAD, STORE, MORE, NOTHING);                                          \
    case PRODUCT: FOLD(T, A, LOAD, STORE, a * b, NOTHING);                                     \
  }                                                                                            \
  return
/* In unsigned types that wrap around; narrow products are formed in `unsigned`. */
#define WRAPPING(U)                                                                            \
  switch (reduction) {                                                                         \
    case SUM: FOLD(U, U, AS_IS, AS_IS, (U)(a + b), NOTHING);                                   \
    case PRODUCT: FOLD(U, U, AS_IS, AS_IS, (U)(1u * a * b), NOTHING);                          \
  }                                                                                            \
  return
#define ORDERED(T)                                                                             \
  switch (reduction) {                                                                         \
    case MIN: FOLD(T, T, AS_IS, AS_IS, a < b ? a : b, NOTHING);                                \
    case MAX: FOLD(T, T, AS_IS, AS_IS, a > b ? a : b, NOTHING);                                \
  }                                                                                            \
  return

/* Conversions need wider vectors than the oldest x86-64 has. Integers are as fast as memory without. */
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && !defined(SAGE_PORTABLE)
#if __GNUC__ >= 12
#define CLONES __attribute__((target_clones("arch=x86-64-v3", "default")))
#else
#define CLONES __attribute__((target_clones("avx2", "default")))
#endif
#else
#define CLONES
#endif

CLONES static void fold_floats(int dtype, int reduction, int world, void *out, char *const *in, int64_t n) {
  switch (dtype) {
    case F32: FLOATS(float, float, AS_IS, AS_IS);
    case F64: FLOATS(double, double, AS_IS, AS_IS);
    case BF16: FLOATS(uint16_t, float, bf16_to_f32, f32_to_bf16);
    case F16: FLOATS(uint16_t, float, f16_to_f32, f32_to_f16);
  }
}

static void fold_wrapping(int bytes, int reduction, int world, void *out, char *const *in, int64_t n) {
  switch (bytes) {
    case 1: WRAPPING(uint8_t);
    case 2: WRAPPING(uint16_t);
    case 4: WRAPPING(uint32_t);
    case 8: WRAPPING(uint64_t);
  }
}

static void fold_ordered(int dtype, int reduction, int world, void *out, char *const *in, int64_t n) {
  switch (dtype) {
    case U8: ORDERED(uint8_t);
    case I8: ORDERED(int8_t);
    case I16: ORDERED(int16_t);
    case I32: ORDERED(int32_t);
    case I64: ORDERED(int64_t);
  }
}

static void fold_bits(int reduction, int world, void *out, char *const *in, int64_t n) {
  switch (reduction) {
    case BAND: FOLD(uint8_t, uint8_t, AS_IS, AS_IS, (uint8_t)(a & b), NOTHING);
    case BOR: FOLD(uint8_t, uint8_t, AS_IS, AS_IS, (uint8_t)(a | b), NOTHING);
    case BXOR: FOLD(uint8_t, uint8_t, AS_IS, AS_IS, (uint8_t)(a ^ b), NOTHING);
  }
}

/* Combine `n` elements of `world` operands into `out`. */
EXPORT void sage_shm_fold(int dtype, int reduction, int world, void *out, char *const *in, int64_t n) {
  static const int bits_of_bool[REDUCTIONS] = {[SUM] = BOR, [MAX] = BOR, [BOR] = BOR, [PRODUCT] = BAND, [MIN] = BAND, [BAND] = BAND, [BXOR] = BXOR};
  if (dtype == F32 || dtype == F64 || dtype == F16 || dtype == BF16) fold_floats(dtype, reduction, world, out, in, n);
  else if (dtype == BOOL) fold_bits(bits_of_bool[reduction], world, out, in, n);
  else if (reduction == SUM || reduction == PRODUCT) fold_wrapping(ITEM[dtype], reduction, world, out, in, n);
  else if (reduction == MIN || reduction == MAX) fold_ordered(dtype, reduction, world, out, in, n);
  else fold_bits(reduction, world, out, in, n * ITEM[dtype]);
}
