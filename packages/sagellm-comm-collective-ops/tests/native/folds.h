/* Every type and reduction, on random bits of up to five ranks, against `reference.h`. */

enum { OPERANDS = 5, ELEMENTS = 1031 };

static char operands[OPERANDS][ELEMENTS * 8] __attribute__((aligned(64)));
static char result[ELEMENTS * 8] __attribute__((aligned(64)));

static uint64_t draw_bits(uint64_t *state) {
  *state ^= *state << 13;
  *state ^= *state >> 7;
  return *state ^= *state << 17;
}

static void fill_operands(int dtype, uint64_t *state) {
  for (int r = 0; r < OPERANDS; r++)
    for (int i = 0; i < ELEMENTS; i++) {
      uint64_t bits = draw_bits(state);
      float near = (float)((int64_t)(bits % 2001) - 1000) / 64;
      if (dtype == BOOL) bits &= 1;
      if (dtype == F32 && i % 2) memcpy(&bits, &near, 4);
      if (dtype == BF16 && i % 2) bits = nearest_bf16(near);
      if (dtype == F64 && i % 2) memcpy(&bits, &(double){near}, 8);
      if (dtype == F16 && i % 2) bits = f32_to_f16(near);
      memcpy(operands[r] + i * ITEM[dtype], &bits, ITEM[dtype]);
    }
}

static int folds(void) {
  static const int worlds[] = {2, 3, OPERANDS};
  static const int64_t lengths[] = {1, 7, ELEMENTS};
  uint64_t state = 88172645463325252u;
  long agreed = 0;
  char *in[OPERANDS];
  for (int r = 0; r < OPERANDS; r++) in[r] = operands[r];
  for (int dtype = 0; dtype < DTYPES; dtype++)
    for (int reduction = 0; reduction < REDUCTIONS; reduction++)
      for (int w = 0; w < 3; w++)
        for (int l = 0; l < 3 && reduces(dtype, reduction); l++) {
          fill_operands(dtype, &state);
          sage_shm_fold(dtype, reduction, worlds[w], result, in, lengths[l]);
          for (int64_t i = 0; i < lengths[l]; i++, agreed++)
            if (!is_right(dtype, reduction, worlds[w], result, in, i)) {
              fprintf(stderr, "type %d reduction %d of %d ranks, element %d of %d\n", dtype, reduction, worlds[w],
                      (int)i, (int)lengths[l]);
              return 1;
            }
          sage_shm_fold(dtype, reduction, worlds[w], in[worlds[w] - 1], in, lengths[l]); /* into an operand */
          if (memcmp(in[worlds[w] - 1], result, lengths[l] * ITEM[dtype])) return 3;
        }
  printf("%ld elements agree\n", agreed);
  return 0;
}
