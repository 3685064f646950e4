/* The segment's numbers as layout.py has them, and what a rank knows of the call it runs. */
#pragma once
#include <stdatomic.h>
#include <stdint.h>

#define EXPORT __attribute__((visibility("default")))
#define INLINE static inline __attribute__((always_inline))
#define ABI 1

enum { PAGE = 4096, CONTROL = PAGE, CONTROL_BYTES = 256, POISON = 128, REASON = 128, MAX_RANKS = 64 };
enum { SEQUENCE = 0, SIGNATURE = 1, SIGNATURE_WORDS = 3, SYMMETRIC = 8, SYMMETRIC_WORDS = 2 };
enum { BARRIER, ALL_REDUCE, ALL_GATHER, REDUCE_SCATTER, ALL_TO_ALL, BROADCAST, REDUCE, GATHER, SCATTER, OPS };
enum { U8, I8, I16, I32, I64, F16, BF16, F32, F64, BOOL, DTYPES };
enum { NONE, SUM, AVG, MIN, MAX, PRODUCT, BAND, BOR, BXOR, REDUCTIONS };
enum { DIRECT, ONE_SHOT, TWO_SHOT, SYMMETRIC_IN_PLACE, ALGORITHMS };
enum { CAUSE_NONE, ABORTED, MISMATCH, TIMEOUT, LOST, ERROR, CLOSED };
enum { OK = 0, AGAIN = 1, FAILED = 2, INTERRUPTED = 3 };
enum { F_UNEVEN = 2 };
enum { RING = 512, HISTOGRAM = 256, BUCKETS = 65, OVERRIDES = 32, YIELDS = 400 };
#define FIRST_NAP_NS 20000
#define LONGEST_NAP_NS 1000000
#define INTERRUPT_NS 50000000
#define LONGEST_CLOSE_NS 2000000000
#define SYMMETRIC_BLOCK (256 << 10)

typedef _Atomic int64_t flag;

/* written by the calling thread, read by any */
typedef struct {
  flag calls, nbytes, total_ns, wait_ns, histogram[HISTOGRAM];
} counter;

typedef struct {
  flag number, packed, nbytes, started_ns, ended_ns, wait_ns, algorithm;
} record;

typedef struct {
  int64_t op, low, high, algorithm;
} override;

typedef struct {
  char *base;
  int rank, world;
  int64_t slot, part, data, arena, arena_bytes, polls;
  int64_t one_shot_bytes, symmetric_bytes, chunk_bytes, hold_ns, hold_bytes;
  int fds[MAX_RANKS];
  override overrides[OVERRIDES];
  int override_count, statistics;
  /* the call that runs */
  int64_t word, n, each, seq, number, steps, step, aux_step, part_now, longest, timeout_ns, deadline_ns, started_ns, wait_ns;
  char *in, *out;
  const int64_t *aux;
  int op, dtype, reduction, root, algorithm, phase, unsigned_yet, offered, any_symmetric, all_symmetric;
  int64_t gives[MAX_RANKS], takes[MAX_RANKS];
  char *arenas[MAX_RANKS];
  /* how it ended, and what was counted */
  int cause, bad_rank;
  _Atomic(counter *) counters[OPS][ALGORITHMS][BUCKETS];
  record ring[RING];
  flag recorded;                     /* calls that have a record, the running one with them */
  atomic_int closed, resumed, told;  /* told: this rank has written why it poisoned */
} context;

typedef struct {
  context *c;
  int64_t word, n, timeout_ns;
  char *in, *out;
} prepared;
