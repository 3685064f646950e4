/* What a fold must give, element by element and by other means than the engine's: conversions by the
 * compiler's own 16-bit type or by the distances to both neighbours, integers in 64 bits.
 */
#include <math.h>

static double distance(float a, float b) { return isinf(b) ? ldexp(1, 128) - fabs(a) : fabs((double)a - (double)b); }

static uint16_t nearest_bf16(float f) {
  uint32_t u, bits;
  float low, high;
  memcpy(&u, &f, 4);
  if (isnan(f)) return 0x7fc0;
  if (isinf(f)) return (uint16_t)(u >> 16);
  bits = u & 0xffff0000u;
  memcpy(&low, &bits, 4);
  bits += 0x10000u;
  memcpy(&high, &bits, 4);
  double down = distance(f, low), up = distance(f, high);
  if (down != up) return (uint16_t)((u >> 16) + (up < down));
  return (uint16_t)((u >> 16) + (u >> 16 & 1));
}

static int is_float(int dtype) { return dtype == F16 || dtype == BF16 || dtype == F32 || dtype == F64; }

static int reduces(int dtype, int reduction) {
#ifndef __FLT16_MAX__
  if (dtype == F16) return 0;
#endif
  if (is_float(dtype)) return reduction >= SUM && reduction <= PRODUCT;
  return reduction != NONE && reduction != AVG;
}

/* Element `i` as a double; exact, and in steps that are rounded where the type's sums are. */
static double load_float(int dtype, const char *x, int64_t i) {
  if (dtype == F32) return ((const float *)x)[i];
  if (dtype == F64) return ((const double *)x)[i];
#ifdef __FLT16_MAX__
  if (dtype == F16) return (double)((const _Float16 *)x)[i];
#endif
  uint32_t u = (uint32_t)((const uint16_t *)x)[i] << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}

static double rounded(int dtype, double x) {
  volatile float narrow = (float)x;
  return dtype == F64 ? x : narrow;
}

static double combine(int reduction, double a, double b) {
  if (reduction == PRODUCT) return a * b;
  if (reduction == SUM || reduction == AVG) return a + b;
  if (isnan(a) || isnan(b)) return NAN;
  return (reduction == MIN) == (a < b) ? a : b;
}

static uint64_t load_integer(int dtype, const char *x, int64_t i) {
  switch (dtype) {
    case I8: return (uint64_t)(int64_t)((const int8_t *)x)[i];
    case I16: return (uint64_t)(int64_t)((const int16_t *)x)[i];
    case I32: return (uint64_t)(int64_t)((const int32_t *)x)[i];
    case I64: return ((const uint64_t *)x)[i];
    default: return ((const uint8_t *)x)[i];
  }
}

static uint64_t combine_integers(int dtype, int reduction, uint64_t a, uint64_t b) {
  int less = dtype == U8 || dtype == BOOL ? a < b : (int64_t)a < (int64_t)b;
  switch (reduction) {
    case SUM: return dtype == BOOL ? (a | b) : a + b;
    case PRODUCT: return a * b;
    case MIN: return less ? a : b;
    case MAX: return less ? b : a;
    case BAND: return a & b;
    case BOR: return a | b;
    default: return a ^ b;
  }
}

/* Whether element `i` of `out` is what the operands in rank order give. Of two zeros either is the smaller. */
static int is_right(int dtype, int reduction, int ranks, const char *out, char *const *in, int64_t i) {
  if (!is_float(dtype)) {
    uint64_t sum = load_integer(dtype, in[0], i), mask = ITEM[dtype] == 8 ? ~UINT64_C(0) : (UINT64_C(1) << 8 * ITEM[dtype]) - 1;
    for (int r = 1; r < ranks; r++) sum = combine_integers(dtype, reduction, sum, load_integer(dtype, in[r], i));
    return (sum & mask) == (load_integer(dtype, out, i) & mask);
  }
  double sum = load_float(dtype, in[0], i);
  for (int r = 1; r < ranks; r++) sum = rounded(dtype, combine(reduction, sum, load_float(dtype, in[r], i)));
  if (reduction == AVG) sum = rounded(dtype, sum / ranks);
  double found = load_float(dtype, out, i), wanted = sum;
  if (isnan(sum) || isnan(found)) return isnan(sum) && isnan(found);
  if (dtype == BF16) {
    uint16_t bits = nearest_bf16((float)sum);
    wanted = load_float(BF16, (char *)&bits, 0);
  }
#ifdef __FLT16_MAX__
  if (dtype == F16) wanted = (double)(_Float16)(float)sum;
#endif
  if (reduction == MIN || reduction == MAX) return found == wanted;
  return found == wanted && signbit(found) == signbit(wanted);
}
