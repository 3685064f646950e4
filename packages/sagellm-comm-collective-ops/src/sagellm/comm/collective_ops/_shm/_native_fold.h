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
#ifdef __FLT16_MANT_DIG__
INLINE float f16_to_f32(uint16_t b) {
  _Float16 h;
  memcpy(&h, &b, 2);
  return (float)h;
}
INLINE uint16_t f32_to_f16(float f) {
  _Float16 h = (_Float16)f;
  uint16_t b;
  memcpy(&b, &h, 2);
  return b;
}
#else
INLINE float f16_to_f32(uint16_t b) {
  uint32_t sign = (uint32_t)(b & 0x8000) << 16, e = b >> 10 & 31, m = b & 1023, u;
  float f;
  if (e == 0) {
    f = (float)m * 0x1p-24f;
    return sign ? -f : f;
  }
  u = sign | (e == 31 ? 0x7f800000 : (e + 112) << 23) | m << 13;
  memcpy(&f, &u, 4);
  return f;
}
INLINE uint16_t f32_to_f16(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  uint16_t sign = u >> 16 & 0x8000;
  u &= 0x7fffffff;
  if (u > 0x7f800000) return sign | 0x7e00;
  if (u >= 0x477ff000) return sign | 0x7c00;
  if (u < 0x38800000) {
    float a, magic = 0.5f;
    memcpy(&a, &u, 4);
    a += magic;
    memcpy(&u, &a, 4);
    return sign | (uint16_t)(u - 0x3f000000);
  }
  u += 0xc8000fff + (u >> 13 & 1);
  return sign | (uint16_t)(u >> 13);
}
#endif

#define BLOCK 1024 /* elements that are combined at a time: all operands of it stay in cache */

/* `out` may be one of the operands. Always ((x0 . x1) . x2) . ..., in the wider type A. */
#define FOLD(T, A, LOAD, STORE, EXPR, FINISH)                                                  \
  do {                                                                                         \
    T *o = (T *)out;                                                                           \
    if (world == 2) {                                                                          \
      const T *x0 = (const T *)in[0], *x1 = (const T *)in[1];                                  \
      _Pragma("GCC ivdep") for (int64_t i = 0; i < n; i++) {                                   \
        A a = LOAD(x0[i]), b = LOAD(x1[i]);                                                    \
        A r = (EXPR);                                                                          \
        FINISH;                                                                                \
        o[i] = STORE(r);                                                                       \
      }                                                                                        \
    } else {                                                                                   \
      A acc[BLOCK];                                                                            \
      for (int64_t at = 0; at < n; at += BLOCK) {                                              \
        int64_t m = n - at < BLOCK ? n - at : BLOCK;                                           \
        const T *x0 = (const T *)in[0] + at;                                                   \
        for (int64_t i = 0; i < m; i++) acc[i] = LOAD(x0[i]);                                  \
        for (int r_ = 1; r_ < world; r_++) {                                                   \
          const T *x1 = (const T *)in[r_] + at;                                                \
          for (int64_t i = 0; i < m; i++) {                                                    \
            A a = acc[i], b = LOAD(x1[i]);                                                     \
            acc[i] = (EXPR);                                                                   \
          }                                                                                    \
        }                                                                                      \
        for (int64_t i = 0; i < m; i++) {                                                      \
          A r = acc[i];                                                                        \
          FINISH;                                                                              \
          o[at + i] = STORE(r);                                                                \
        }                                                                                      \
      }                                                                                        \
    }                                                                                          \
    return;                                                                                    \
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
