/* Collectives on a segment that the ranks of one host share: the C engine of the shm backend.
 *
 * layout.py says where everything lies and which rules the flags follow; the numbers here repeat
 * its own and a test compares them. No Python, no threads, no allocation after `open` but for
 * counters. One call at a time per context; `poison` may come from any thread.
 *
 * A call is a number of steps. In each a rank waits until its slot may be written again, writes
 * it, publishes the step, waits for its peers, and reads their slots. A wait that takes longer
 * than the caller wants to hold its interpreter returns AGAIN, and `resume` goes on from there.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define EXPORT __attribute__((visibility("default")))
#define INLINE static inline __attribute__((always_inline))
#define ABI 3

enum { PAGE = 4096, CONTROL = PAGE, CONTROL_BYTES = 256, POISON = 128, REASON = 128, MAX_RANKS = 64 };
enum { SEQUENCE = 0, SIGNATURE = 1, SIGNATURE_WORDS = 3, SYMMETRIC = 8, SYMMETRIC_WORDS = 2 };
enum { BARRIER, ALL_REDUCE, ALL_GATHER, REDUCE_SCATTER, ALL_TO_ALL, BROADCAST, REDUCE, GATHER, SCATTER, OPS };
enum { U8, I8, I16, I32, I64, F16, BF16, F32, F64, BOOL, DTYPES };
enum { NONE, SUM, AVG, MIN, MAX, PRODUCT, BAND, BOR, BXOR, REDUCTIONS };
enum { DIRECT, ONE_SHOT, TWO_SHOT, SYMMETRIC_IN_PLACE, ALGORITHMS };
enum { CAUSE_NONE, ABORTED, MISMATCH, TIMEOUT, LOST, ERROR, CLOSED };
enum { OK = 0, AGAIN = 1, FAILED = 2, INTERRUPTED = 3, TANGLED = 4 };
enum { F_UNEVEN = 2 };
enum { RING = 512, HISTOGRAM = 256, BUCKETS = 65, OVERRIDES = 32, YIELDS = 400 };
#define FIRST_NAP_NS 20000
#define LONGEST_NAP_NS 1000000
#define INTERRUPT_NS 50000000
#define LONGEST_CLOSE_NS 2000000000
#define SYMMETRIC_BLOCK (256 << 10)

typedef _Atomic int64_t flag;

/* written by the calling thread, read by any; a reset, from any thread, only notes where they stood */
typedef struct {
  flag calls, nbytes, total_ns, wait_ns, histogram[HISTOGRAM];
  int64_t before[4 + HISTOGRAM];
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

/* ---- elements -------------------------------------------------------------------------------- */

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
/* Wrapping and bits do not see a sign; narrow products are formed in `unsigned`. */
#define UNSIGNED(U)                                                                            \
  switch (reduction) {                                                                         \
    case SUM: FOLD(U, U, AS_IS, AS_IS, (U)(a + b), NOTHING);                                   \
    case PRODUCT: FOLD(U, U, AS_IS, AS_IS, (U)(1u * a * b), NOTHING);                          \
    case BAND: FOLD(U, U, AS_IS, AS_IS, (U)(a & b), NOTHING);                                  \
    case BOR: FOLD(U, U, AS_IS, AS_IS, (U)(a | b), NOTHING);                                   \
    case BXOR: FOLD(U, U, AS_IS, AS_IS, (U)(a ^ b), NOTHING);                                  \
  }                                                                                            \
  return
#define ORDERED(T)                                                                             \
  if (reduction == MIN) FOLD(T, T, AS_IS, AS_IS, a < b ? a : b, NOTHING);                      \
  if (reduction == MAX) FOLD(T, T, AS_IS, AS_IS, a > b ? a : b, NOTHING)

#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && !defined(SAGE_PORTABLE)
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES
#endif

/* Combine `n` elements of `world` operands into `out`. */
CLONES EXPORT void sage_shm_fold(int dtype, int reduction, int world, void *out, char *const *in, int64_t n) {
  switch (dtype) {
    case F32: FLOATS(float, float, AS_IS, AS_IS);
    case F64: FLOATS(double, double, AS_IS, AS_IS);
    case BF16: FLOATS(uint16_t, float, bf16_to_f32, f32_to_bf16);
    case F16: FLOATS(uint16_t, float, f16_to_f32, f32_to_f16);
    case I8: ORDERED(int8_t); UNSIGNED(uint8_t);
    case U8: ORDERED(uint8_t); UNSIGNED(uint8_t);
    case I16: ORDERED(int16_t); UNSIGNED(uint16_t);
    case I32: ORDERED(int32_t); UNSIGNED(uint32_t);
    case I64: ORDERED(int64_t); UNSIGNED(uint64_t);
    case BOOL:
      switch (reduction) {
        case SUM: case MAX: case BOR: FOLD(uint8_t, uint8_t, AS_IS, AS_IS, (uint8_t)(a | b), NOTHING);
        case PRODUCT: case MIN: case BAND: FOLD(uint8_t, uint8_t, AS_IS, AS_IS, (uint8_t)(a & b), NOTHING);
        case BXOR: FOLD(uint8_t, uint8_t, AS_IS, AS_IS, (uint8_t)(a ^ b), NOTHING);
      }
  }
}

/* ---- flags ----------------------------------------------------------------------------------- */

INLINE flag *control(const context *c, int rank) { return (flag *)(c->base + CONTROL + (int64_t)rank * CONTROL_BYTES); }
INLINE char *slot_of(const context *c, int rank, int64_t seq) {
  return c->base + c->data + (2 * (int64_t)rank + (seq & 1)) * c->slot;
}
INLINE int64_t published(const context *c, int rank) {
  return atomic_load_explicit(control(c, rank) + SEQUENCE, memory_order_acquire);
}
INLINE int64_t get(const context *c, int rank, int word) {
  return atomic_load_explicit(control(c, rank) + word, memory_order_relaxed);
}
INLINE void set(context *c, int word, int64_t value) {
  atomic_store_explicit(control(c, c->rank) + word, value, memory_order_relaxed);
}
INLINE flag *poison_word(const context *c) { return (flag *)(c->base + POISON); }
INLINE void relax(void) {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("isb");
#endif
}
static int64_t now_ns(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * INT64_C(1000000000) + t.tv_nsec;
}

EXPORT void sage_shm_poison(context *c, int cause, const char *reason) {
  flag *word = poison_word(c);
  if (atomic_load_explicit(word, memory_order_acquire) || atomic_exchange(&c->told, 1)) return;
  char *text = (char *)control(c, c->rank) + REASON;
  size_t length = strlen(reason);
  if (length > CONTROL_BYTES - REASON - 1) length = CONTROL_BYTES - REASON - 1;
  memcpy(text, reason, length);
  text[length] = 0;
  int64_t none = 0;
  atomic_compare_exchange_strong(word, &none, (int64_t)cause << 32 | (c->rank + 1));
}

static int failed(context *c, int cause, int rank) {
  c->cause = cause;
  c->bad_rank = rank;
  return FAILED;
}

static int report(context *c, int cause, int rank, const char *reason) {
  sage_shm_poison(c, cause, reason);
  return failed(c, cause, rank);
}

INLINE int is_closed(const context *c) { return __builtin_expect(atomic_load(&c->closed), 0); }

static int poisoned(context *c) {
  int64_t word = atomic_load_explicit(poison_word(c), memory_order_acquire);
  return word ? failed(c, (int)(word >> 32), (int)(word & 0xffffffff) - 1) : OK;
}

/* A peer whose socket has ended before it published `seq`, oneself if one's own was closed; -1 if there is none. */
static int lost(context *c, int64_t seq) {
  struct pollfd fds[MAX_RANKS];
  int ranks[MAX_RANKS], count = 0;
  for (int r = 0; r < c->world; r++)
    if (r != c->rank && c->fds[r] >= 0) {
      fds[count] = (struct pollfd){.fd = c->fds[r], .events = POLLRDHUP};
      ranks[count++] = r;
    }
  if (poll(fds, count, 0) <= 0) return -1;
  int64_t word = atomic_load_explicit(poison_word(c), memory_order_acquire);
  for (int i = 0; i < count; i++)
    if (fds[i].revents && published(c, ranks[i]) < seq) {
      if (fds[i].revents & POLLNVAL) return c->rank;
      if ((word & 0xffffffff) - 1 != ranks[i]) return ranks[i];
    }
  return -1;
}

static int nap_until(context *c, int rank, int64_t seq) {
  int64_t nap = FIRST_NAP_NS, start = now_ns();
  if (!c->deadline_ns) c->deadline_ns = start + c->timeout_ns;
  while (published(c, rank) < seq) {
    int gone = lost(c, seq), rc;
    if (gone == c->rank || is_closed(c)) return failed(c, CLOSED, c->rank);
    if (gone >= 0) return report(c, LOST, gone, "a rank is gone");
    if ((rc = poisoned(c))) return rc;
    int64_t now = now_ns();
    if (now > c->deadline_ns) {
      if (published(c, rank) >= seq) return OK;
      return report(c, TIMEOUT, rank, "a rank did not come before the deadline");
    }
    if (now - start > INTERRUPT_NS) return INTERRUPTED;
    struct timespec t = {0, nap};
    if (nanosleep(&t, 0) && errno == EINTR) return INTERRUPTED;
    if ((nap += nap / 2) > LONGEST_NAP_NS) nap = LONGEST_NAP_NS;
  }
  return OK;
}

/* Until `rank` has published `seq`. `hold_ns` > 0: give up with AGAIN after about that long. */
static int wait_slowly(context *c, int rank, int64_t seq, int64_t hold_ns) {
  int64_t start = now_ns();
  int rc = OK, done = 0;
  for (int64_t i = 0; i < c->polls && !done; i++) {
    relax();
    done = published(c, rank) >= seq;
    if (hold_ns && !(i & 255) && now_ns() - start > hold_ns) break;
  }
  for (int i = 0; !done && !rc; i++) {
    if (now_ns() - start > (hold_ns ? hold_ns : INTERRUPT_NS) || (!hold_ns && i >= YIELDS)) break;
    sched_yield();
    done = published(c, rank) >= seq;
    if (!done) rc = poisoned(c);
  }
  if (!done && !rc) rc = hold_ns ? AGAIN : nap_until(c, rank, seq);
  c->wait_ns += now_ns() - start;
  return rc;
}

INLINE int wait_for(context *c, int rank, int64_t seq, int64_t hold_ns) {
  return __builtin_expect(published(c, rank) >= seq, 1) ? OK : wait_slowly(c, rank, seq, hold_ns);
}

INLINE int wait_for_all(context *c, int64_t seq, int64_t hold_ns) {
  for (int r = 0; r < c->world; r++)
    if (r != c->rank) {
      int rc = wait_for(c, r, seq, hold_ns);
      if (rc) return rc;
    }
  return OK;
}

/* ---- operations: what is written and read in a step ------------------------------------------ */

INLINE int64_t share(int64_t n, int64_t low, int64_t length) {
  int64_t left = n - low;
  return left <= 0 ? 0 : left < length ? left : length;
}
INLINE void move(void *to, const void *from, int64_t n) {
  if (n > 0) memcpy(to, from, n);
}
INLINE int64_t steps_of(int64_t n, int64_t chunk) { return n ? (n + chunk - 1) / chunk : 1; }

/* Operands of a fold: every peer's slot of `seq` at `at`, and `mine`. */
INLINE void gather_operands(const context *c, int64_t seq, int64_t at, char *mine, char **operands) {
  for (int r = 0; r < c->world; r++) operands[r] = r == c->rank ? mine : slot_of(c, r, seq) + at;
}

static int algorithm_for(const context *c, int op, int64_t n, int symmetric) {
  if (op != ALL_REDUCE) return DIRECT;
  for (int i = 0; i < c->override_count; i++) {
    const override *o = &c->overrides[i];
    if (o->op == op && o->low <= n && n < o->high && (o->algorithm != SYMMETRIC_IN_PLACE || symmetric))
      return (int)o->algorithm;
  }
  if (symmetric && n > c->symmetric_bytes) return SYMMETRIC_IN_PLACE;
  return n <= c->one_shot_bytes ? ONE_SHOT : TWO_SHOT;
}

static void plan_staged(context *c) {
  c->step = 0;
  c->algorithm = algorithm_for(c, c->op, c->n, 0);
  if (c->algorithm == ONE_SHOT) {
    c->steps = steps_of(c->n, c->chunk_bytes);
    return;
  }
  int64_t chunks = steps_of(c->n, c->world * c->part);
  int64_t m = (c->n + chunks * c->world - 1) / (chunks * c->world);
  c->part_now = (m + 63) / 64 * 64;
  if (!c->part_now) c->part_now = 64;
  c->steps = steps_of(c->n, c->part_now * c->world) + 1;
}

static void plan(context *c) {
  c->algorithm = DIRECT;
  switch (c->op) {
    case BARRIER: c->steps = 1; break;
    case ALL_REDUCE:
      if (c->offered) {
        c->algorithm = SYMMETRIC_IN_PLACE;
        c->steps = 2;
      } else
        plan_staged(c);
      break;
    case REDUCE_SCATTER: case SCATTER: c->steps = steps_of(c->each, c->part); break;
    case ALL_TO_ALL: c->steps = c->word >> 24 & F_UNEVEN ? 1 : steps_of(c->longest, c->part); break;
    default: c->steps = steps_of(c->n, c->slot);
  }
}

static void write_step(context *c) {
  char *own = slot_of(c, c->rank, c->seq);
  int64_t k = c->step, low, m = c->part_now;
  int me = c->rank, world = c->world;
  switch (c->op) {
    case ALL_REDUCE:
      if (c->algorithm == ONE_SHOT) {
        low = k * c->chunk_bytes;
        move(own, c->out + low, share(c->n, low, c->chunk_bytes));
      } else if (c->algorithm == TWO_SHOT) {
        int64_t chunk = m * world;
        if (k + 1 < c->steps)
          for (int p = 0; p < world; p++)
            if (p != me) {
              low = k * chunk + p * m;
              move(own + p * m, c->out + low, share(c->n, low, m));
            }
        if (k) {
          low = (k - 1) * chunk + me * m;
          int64_t length = share(c->n, low, m);
          char *operands[MAX_RANKS];
          gather_operands(c, c->seq - 1, me * m, c->out + low, operands);
          if (length) {
            sage_shm_fold(c->dtype, c->reduction, world, own + me * m, operands, length / ITEM[c->dtype]);
            memcpy(c->out + low, own + me * m, length);
          }
        }
      }
      break;
    case ALL_GATHER: move(own, c->in + k * c->slot, share(c->n, k * c->slot, c->slot)); break;
    case REDUCE_SCATTER:
      low = k * c->part;
      for (int p = 0; p < world; p++)
        if (p != me) move(own + p * c->part, c->in + p * c->each + low, share(c->each, low, c->part));
      break;
    case BROADCAST:
      if (me == c->root) move(own, c->out + k * c->slot, share(c->n, k * c->slot, c->slot));
      break;
    case REDUCE:
      if (me != c->root) move(own, c->out + k * c->slot, share(c->n, k * c->slot, c->slot));
      break;
    case GATHER:
      if (me != c->root) move(own, c->in + k * c->slot, share(c->n, k * c->slot, c->slot));
      break;
    case SCATTER:
      low = k * c->part;
      if (me == c->root)
        for (int p = 0; p < world; p++) {
          char *x = (char *)(intptr_t)c->aux[p];
          move(p == me ? c->out + low : own + p * c->part, x + low, share(c->n, low, c->part));
        }
      break;
    case ALL_TO_ALL:
      if (c->aux_step) {
        memcpy(own, c->gives, world * sizeof(int64_t));
        memcpy(own + world * sizeof(int64_t), c->takes, world * sizeof(int64_t));
      } else {
        char *x = c->in;
        low = k * c->part;
        for (int p = 0; p < world; x += c->gives[p++])
          if (p != me) move(own + p * c->part, x + low, share(c->gives[p], low, c->part));
      }
      break;
  }
}

/* Every rank adds its share where it lies in all arenas, and writes it to all. */
static int reduce_in_place(context *c) {
  int64_t m = ((c->n + c->world - 1) / c->world + 63) / 64 * 64, low = c->rank * m;
  int64_t end = low + m < c->n ? low + m : c->n;
  char *operands[MAX_RANKS];
  for (; low < end; low += SYMMETRIC_BLOCK) {
    int64_t length = share(end, low, SYMMETRIC_BLOCK);
    int rc = poisoned(c);
    if (rc) return rc; /* peers may have gone on to use their tensors */
    for (int r = 0; r < c->world; r++) operands[r] = c->arenas[r] + low;
    sage_shm_fold(c->dtype, c->reduction, c->world, c->out + low, operands, length / ITEM[c->dtype]);
    for (int r = 0; r < c->world; r++)
      if (r != c->rank) memcpy(operands[r], c->out + low, length);
  }
  return OK;
}

static int read_table(context *c) {
  int64_t world = c->world;
  c->longest = 0;
  for (int r = 0; r < world; r++) {
    const int64_t *gives = (const int64_t *)slot_of(c, r, c->seq);
    for (int p = 0; p < world; p++) {
      const int64_t *takes = (const int64_t *)slot_of(c, p, c->seq) + world;
      if (gives[p] != takes[r]) return report(c, MISMATCH, r == c->rank ? p : r, "ranks disagree on splits");
      if (p != r && gives[p] > c->longest) c->longest = gives[p];
    }
  }
  c->aux_step = 0;
  c->step = -1;
  c->steps = steps_of(c->longest, c->part);
  return OK;
}

static int read_step(context *c) {
  int64_t k = c->step, low, m = c->part_now;
  int me = c->rank, world = c->world;
  char *operands[MAX_RANKS];
  switch (c->op) {
    case ALL_REDUCE:
      if (c->algorithm == ONE_SHOT) {
        low = k * c->chunk_bytes;
        /* one's own operand from its own slot would do as well, but the tensor is nearer */
        gather_operands(c, c->seq, 0, c->out + low, operands);
        int64_t length = share(c->n, low, c->chunk_bytes);
        sage_shm_fold(c->dtype, c->reduction, world, c->out + low, operands, length / ITEM[c->dtype]);
      } else if (c->algorithm == TWO_SHOT) {
        if (k)
          for (int p = 0; p < world; p++)
            if (p != me) {
              low = (k - 1) * m * world + p * m;
              move(c->out + low, slot_of(c, p, c->seq) + p * m, share(c->n, low, m));
            }
      } else if (!k)
        return reduce_in_place(c);
      break;
    case ALL_GATHER:
      low = k * c->slot;
      for (int p = 0; p < world; p++) {
        char *to = c->out + p * c->n + low;
        const char *from = p == me ? c->in + low : slot_of(c, p, c->seq);
        if (to != from) move(to, from, share(c->n, low, c->slot));
      }
      break;
    case REDUCE_SCATTER:
      low = k * c->part;
      gather_operands(c, c->seq, me * c->part, c->in + me * c->each + low, operands);
      sage_shm_fold(c->dtype, c->reduction, world, c->out + low, operands, share(c->each, low, c->part) / ITEM[c->dtype]);
      break;
    case BROADCAST:
      if (me != c->root) move(c->out + k * c->slot, slot_of(c, c->root, c->seq), share(c->n, k * c->slot, c->slot));
      break;
    case REDUCE:
      low = k * c->slot;
      if (me == c->root) {
        gather_operands(c, c->seq, 0, c->out + low, operands);
        sage_shm_fold(c->dtype, c->reduction, world, c->out + low, operands, share(c->n, low, c->slot) / ITEM[c->dtype]);
      }
      break;
    case GATHER:
      low = k * c->slot;
      if (me == c->root)
        for (int p = 0; p < world; p++) {
          char *to = (char *)(intptr_t)c->aux[p] + low;
          const char *from = p == me ? c->in + low : slot_of(c, p, c->seq);
          if (to != from) move(to, from, share(c->n, low, c->slot));
        }
      break;
    case SCATTER:
      low = k * c->part;
      if (me != c->root) move(c->out + low, slot_of(c, c->root, c->seq) + me * c->part, share(c->n, low, c->part));
      break;
    case ALL_TO_ALL:
      if (c->aux_step) return read_table(c);
      char *to = c->out, *x = c->in;
      for (int p = 0; p < me; p++) x += c->gives[p];
      low = k * c->part;
      for (int p = 0; p < world; to += c->takes[p++]) {
        int64_t length = share(c->takes[p], low, c->part);
        if (p == me) move(to, x, k ? 0 : c->takes[p]);
        else move(to + low, slot_of(c, p, c->seq) + me * c->part, length);
      }
      break;
  }
  return OK;
}

/* ---- the driver ---------------------------------------------------------------------------- */

static void sign(context *c) {
  int at = SIGNATURE + (int)(c->seq & 1) * SIGNATURE_WORDS, arena = SYMMETRIC + (int)(c->seq & 1) * SYMMETRIC_WORDS;
  int64_t offset = c->offered ? c->out - (c->base + c->arena + c->rank * c->arena_bytes) + 1 : 0;
  set(c, at, c->word);
  set(c, at + 1, c->word >> 24 & F_UNEVEN ? 0 : c->n);
  set(c, at + 2, c->number);
  set(c, arena, offset);
  set(c, arena + 1, offset);
}

/* After the first wait of a call: do all ranks make the same call, and where are their tensors? */
static int compare(context *c) {
  int at = SIGNATURE + (int)(c->seq & 1) * SIGNATURE_WORDS, arena = SYMMETRIC + (int)(c->seq & 1) * SYMMETRIC_WORDS;
  int64_t n = c->word >> 24 & F_UNEVEN ? 0 : c->n;
  c->any_symmetric = c->offered;
  c->all_symmetric = c->offered;
  for (int r = 0; r < c->world; r++) {
    if (r == c->rank) {
      c->arenas[r] = c->out;
      continue;
    }
    if (get(c, r, at) != c->word || get(c, r, at + 1) != n)
      return report(c, MISMATCH, r, "ranks made different calls");
    if (c->op != ALL_REDUCE) continue;
    int64_t offset = get(c, r, arena);
    c->any_symmetric |= offset != 0;
    c->all_symmetric &= offset != 0;
    c->arenas[r] = c->base + c->arena + r * c->arena_bytes + offset - 1;
  }
  c->unsigned_yet = 0;
  return OK;
}

/* One thread writes these words, so that no read-modify-write has to be atomic. */
INLINE int64_t peek(const flag *word) { return atomic_load_explicit(word, memory_order_relaxed); }
INLINE void put(flag *word, int64_t value) { atomic_store_explicit(word, value, memory_order_relaxed); }
INLINE void add(flag *word, int64_t value) { put(word, peek(word) + value); }

static void start_record(context *c) {
  record *r = &c->ring[c->number % RING];
  put(&r->number, c->number);
  put(&r->packed, c->word);
  put(&r->nbytes, c->n);
  put(&r->started_ns, c->started_ns);
  put(&r->ended_ns, 0);
  put(&r->wait_ns, 0);
  put(&r->algorithm, c->algorithm);
  atomic_store_explicit(&c->recorded, c->number + 1, memory_order_release);
}

static void count(context *c) {
  static const uint16_t eighths[8] = {0, 2967, 6202, 9729, 13574, 17769, 22343, 27327}; /* (2^(i/8) - 1) * 2^15 */
  int64_t ended = now_ns(), spent = ended - c->started_ns;
  int bucket = c->n ? 64 - __builtin_clzll((uint64_t)c->n) : 0;
  _Atomic(counter *) *slot = &c->counters[c->op][c->algorithm][bucket];
  counter *k = atomic_load_explicit(slot, memory_order_relaxed);
  if (!k) {
    if (!(k = calloc(1, sizeof(counter)))) return;
    atomic_store_explicit(slot, k, memory_order_release);
  }
  uint64_t tens = spent < 10 ? 1 : (uint64_t)spent / 10;
  int octave = 63 - __builtin_clzll(tens), eighth = 7;
  uint64_t fraction = (tens << (63 - octave) << 1) >> 49;
  while (eighth && fraction < eighths[eighth]) eighth--;
  int index = octave * 8 + eighth;
  add(&k->calls, 1);
  add(&k->nbytes, c->n);
  add(&k->total_ns, spent);
  add(&k->wait_ns, c->wait_ns);
  add(&k->histogram[index < HISTOGRAM ? index : HISTOGRAM - 1], 1);
  record *r = &c->ring[c->number % RING];
  put(&r->ended_ns, ended);
  put(&r->wait_ns, c->wait_ns);
  put(&r->algorithm, c->algorithm);
}

static int drive(context *c, int64_t hold_ns) {
  int rc;
  for (; c->step < c->steps; c->step++) {
    if (is_closed(c)) return failed(c, CLOSED, c->rank);
    if (!c->phase) {
      if ((rc = wait_for_all(c, c->seq, hold_ns))) return rc;
      c->seq++;
      write_step(c);
      if (c->unsigned_yet) sign(c);
      atomic_store_explicit(control(c, c->rank) + SEQUENCE, c->seq, memory_order_release);
      c->phase = 1;
    }
    int rooted = c->op == BROADCAST || c->op == SCATTER, to_root = c->op == REDUCE || c->op == GATHER;
    if (c->unsigned_yet || !(rooted || to_root)) {
      if ((rc = wait_for_all(c, c->seq, hold_ns))) return rc;
    } else if (rooted ? c->rank != c->root : c->rank == c->root) {
      if ((rc = rooted ? wait_for(c, c->root, c->seq, hold_ns) : wait_for_all(c, c->seq, hold_ns))) return rc;
    }
    c->phase = 0;
    if (c->unsigned_yet) {
      if ((rc = compare(c))) return rc;
      if (c->any_symmetric && !c->all_symmetric) {
        plan_staged(c); /* this step only told all ranks that not everybody offers an arena */
        c->step = -1;
        continue;
      }
    }
    if ((rc = read_step(c))) return rc;
  }
  if (c->statistics) count(c);
  c->number++;
  c->op = -1;
  return OK;
}

static int begin(context *c, int64_t word, int64_t n, char *in, char *out, const int64_t *aux, int64_t timeout_ns) {
  int rc = is_closed(c) ? failed(c, CLOSED, c->rank) : poisoned(c);
  if (rc) return rc;
  c->word = word;
  c->n = n;
  c->each = (word & 0xff) == REDUCE_SCATTER ? n / c->world : n;
  c->in = in;
  c->out = out;
  c->aux = aux;
  c->op = word & 0xff;
  c->dtype = (int)(word >> 8 & 0xff) - 1;
  c->reduction = word >> 16 & 0xff;
  c->root = (int)(word >> 32 & 0xffff) - 1;
  c->step = c->phase = 0;
  c->unsigned_yet = 1;
  c->aux_step = 0;
  c->timeout_ns = timeout_ns;
  c->wait_ns = 0;
  c->deadline_ns = 0;
  char *arena = c->base + c->arena + c->rank * c->arena_bytes;
  c->offered = c->op == ALL_REDUCE && c->arena_bytes && out >= arena && out + n <= arena + c->arena_bytes &&
               algorithm_for(c, c->op, n, 1) == SYMMETRIC_IN_PLACE;
  if (c->op == ALL_TO_ALL) {
    c->aux_step = word >> 24 & F_UNEVEN;
    c->longest = aux ? 0 : n / c->world;
    for (int p = 0; p < c->world; p++) {
      c->gives[p] = aux ? aux[p] : c->longest;
      c->takes[p] = aux ? aux[c->world + p] : c->longest;
    }
  }
  plan(c);
  if (c->statistics) {
    c->started_ns = now_ns();
    c->deadline_ns = c->started_ns + timeout_ns;
    start_record(c);
  }
  return OK;
}

/* ---- what Python calls ---------------------------------------------------------------------- */

EXPORT int sage_shm_abi(void) { return ABI; }

/* What layout.py and choice.py must agree with, zero-terminated. */
EXPORT const int64_t *sage_shm_layout(void) {
  static const int64_t numbers[] = {ABI, PAGE, CONTROL, CONTROL_BYTES, POISON, REASON, MAX_RANKS,
                                    SIGNATURE, SIGNATURE + SIGNATURE_WORDS, SYMMETRIC, SYMMETRIC + SYMMETRIC_WORDS,
                                    F_UNEVEN, OPS, DTYPES, REDUCTIONS, ALGORITHMS, CLOSED + 1, 0};
  return numbers;
}

EXPORT context *sage_shm_open(char *base, int rank, int world, int64_t slot, int64_t data, int64_t arena,
                              int64_t arena_bytes, const int32_t *fds, int64_t polls, int statistics) {
  if (world < 2 || world > MAX_RANKS) return 0;
  context *c = calloc(1, sizeof(context));
  if (!c) return 0;
  c->base = base;
  c->rank = rank;
  c->world = world;
  c->slot = slot;
  c->part = slot / world / 64 * 64;
  c->data = data;
  c->arena = arena;
  c->arena_bytes = arena_bytes;
  c->polls = polls;
  c->statistics = statistics;
  c->op = -1;
  for (int r = 0; r < world; r++) c->fds[r] = fds[r];
  c->seq = published(c, rank);
  return c;
}

EXPORT void sage_shm_tune(context *c, int64_t one_shot_bytes, int64_t symmetric_bytes, int64_t chunk_bytes,
                          int64_t hold_ns, int64_t hold_bytes) {
  c->one_shot_bytes = one_shot_bytes;
  c->symmetric_bytes = symmetric_bytes;
  c->chunk_bytes = chunk_bytes < c->slot ? chunk_bytes : c->slot;
  c->hold_ns = hold_ns;
  c->hold_bytes = hold_bytes;
}

EXPORT int sage_shm_override(context *c, int64_t op, int64_t low, int64_t high, int64_t algorithm) {
  if (c->override_count == OVERRIDES) return -1;
  c->overrides[c->override_count++] = (override){op, low, high, algorithm};
  return 0;
}

EXPORT int sage_shm_algorithm(const context *c, int op, int64_t n, int symmetric) {
  return algorithm_for(c, op, n, symmetric);
}

/* With the interpreter held: returns AGAIN after `hold_ns` of waiting, at once for long tensors. */
EXPORT int sage_shm_run(context *c, int64_t word, int64_t n, char *in, char *out, const int64_t *aux, int64_t timeout_ns) {
  int rc = begin(c, word, n, in, out, aux, timeout_ns);
  if (rc) return rc;
  return n > c->hold_bytes ? AGAIN : drive(c, c->hold_ns);
}

/* With the interpreter released: to the end, or INTERRUPTED so that signal handlers may run. */
EXPORT int sage_shm_resume(context *c) {
  atomic_store(&c->resumed, 1);
  int rc = drive(c, 0);
  atomic_store(&c->resumed, 0);
  return rc;
}

EXPORT prepared *sage_shm_prepare(context *c, int64_t word, int64_t n, char *in, char *out, int64_t timeout_ns) {
  prepared *p = malloc(sizeof(prepared));
  if (p) *p = (prepared){c, word, n, timeout_ns, in, out};
  return p;
}
EXPORT int sage_shm_go(prepared *p) { return sage_shm_run(p->c, p->word, p->n, p->in, p->out, 0, p->timeout_ns); }
/* Whether the smaller tensor of an all_gather or reduce_scatter lies in the larger one, and not where this
 * rank's part of it is: it would be written over while it is read. */
static int tangled(const context *c, int op, const char *in, const char *out, int64_t n) {
  if (op != ALL_GATHER && op != REDUCE_SCATTER) return 0;
  int64_t part = op == ALL_GATHER ? n : n / c->world;
  const char *small = op == ALL_GATHER ? in : out, *large = op == ALL_GATHER ? out : in;
  return small < large + part * c->world && large < small + part && small != large + part * c->rank;
}
/* The same kind of call on other memory; TANGLED if somebody has to copy first. */
EXPORT int sage_shm_go_at(const prepared *p, char *in, char *out, int64_t n) {
  if (tangled(p->c, p->word & 0xff, in, out, n)) return TANGLED;
  return sage_shm_run(p->c, p->word, n, in, out, 0, p->timeout_ns);
}
EXPORT void sage_shm_forget(prepared *p) { free(p); }

EXPORT void sage_shm_failure(const context *c, int64_t cause_rank_step_call[static 4]) {
  cause_rank_step_call[0] = c->cause;
  cause_rank_step_call[1] = c->bad_rank;
  cause_rank_step_call[2] = c->seq;
  cause_rank_step_call[3] = c->number;
}

/* Rows of op, algorithm, bucket, calls, nbytes, total_ns, wait_ns, histogram; returns how many. Not beside `reset`. */
EXPORT int64_t sage_shm_totals(const context *c, int64_t *rows, int64_t room) {
  int64_t found = 0;
  for (int op = 0; op < OPS; op++)
    for (int a = 0; a < ALGORITHMS; a++)
      for (int b = 0; b < BUCKETS; b++) {
        const counter *k = atomic_load_explicit(&c->counters[op][a][b], memory_order_acquire);
        if (!k || peek(&k->calls) == k->before[0]) continue;
        if (found < room) {
          int64_t *row = rows + found * (7 + HISTOGRAM);
          row[0] = op, row[1] = a, row[2] = b - 1;
          for (int i = 0; i < 4 + HISTOGRAM; i++) row[3 + i] = peek(&k->calls + i) - k->before[i];
        }
        found++;
      }
  return found;
}

EXPORT void sage_shm_reset(context *c) {
  for (int i = 0; i < OPS * ALGORITHMS * BUCKETS; i++) {
    counter *k = atomic_load_explicit(&(&c->counters[0][0][0])[i], memory_order_acquire);
    if (!k) continue;
    for (int word = 0; word < 4 + HISTOGRAM; word++) k->before[word] = peek(&k->calls + word);
  }
}

/* The last calls as rows of `record`; returns how many, oldest first. */
EXPORT int64_t sage_shm_records(const context *c, int64_t *rows) {
  int64_t last = atomic_load_explicit(&c->recorded, memory_order_acquire), first = last > RING ? last - RING : 0;
  for (int64_t i = first; i < last; i++)
    for (int word = 0; word < 7; word++) rows[(i - first) * 7 + word] = peek(&c->ring[i % RING].number + word);
  return last - first;
}

/* Calls fail from now on. 0 when none is in `resume` any more, so that the segment may go away. */
EXPORT int sage_shm_close(context *c) {
  atomic_store(&c->closed, 1);
  for (int64_t end = now_ns() + LONGEST_CLOSE_NS; atomic_load(&c->resumed) && now_ns() < end;)
    nanosleep(&(struct timespec){0, FIRST_NAP_NS}, 0);
  return atomic_load(&c->resumed);
}

/* After `close`, when no call and no `prepared` can come any more. */
EXPORT void sage_shm_free(context *c) {
  for (int i = 0; i < OPS * ALGORITHMS * BUCKETS; i++) free(atomic_load(&(&c->counters[0][0][0])[i]));
  free(c);
}

EXPORT int64_t sage_shm_load_acquire(const flag *word) { return atomic_load_explicit(word, memory_order_acquire); }
EXPORT void sage_shm_store_release(flag *word, int64_t value) { atomic_store_explicit(word, value, memory_order_release); }
