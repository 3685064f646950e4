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
#include <stdlib.h>
#include <string.h>

#include "_native_steps.h"

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

EXPORT const char *sage_shm_layout(void) {
#define TEXT_(x) #x
#define TEXT(x) TEXT_(x)
  return "page=4096 control_bytes=256 poison=128 reason=128 signature=1,4 symmetric=8,10 ops=9 dtypes=10 "
         "reductions=9 abi=" TEXT(ABI);
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
/* The same kind of call on other memory. */
EXPORT int sage_shm_go_at(const prepared *p, char *in, char *out, int64_t n) {
  return sage_shm_run(p->c, p->word, n, in, out, 0, p->timeout_ns);
}
EXPORT void sage_shm_forget(prepared *p) { free(p); }

EXPORT void sage_shm_failure(const context *c, int64_t *cause_rank_step) {
  cause_rank_step[0] = c->cause;
  cause_rank_step[1] = c->bad_rank;
  cause_rank_step[2] = c->seq;
}

/* Rows of op, algorithm, bucket, calls, nbytes, total_ns, wait_ns, histogram; returns how many. */
EXPORT int64_t sage_shm_totals(const context *c, int64_t *rows, int64_t room) {
  int64_t found = 0;
  for (int op = 0; op < OPS; op++)
    for (int a = 0; a < ALGORITHMS; a++)
      for (int b = 0; b < BUCKETS; b++) {
        const counter *k = atomic_load_explicit(&c->counters[op][a][b], memory_order_acquire);
        if (!k || !peek(&k->calls)) continue;
        if (found < room) {
          int64_t *row = rows + found * (7 + HISTOGRAM);
          row[0] = op, row[1] = a, row[2] = b - 1;
          for (size_t i = 0; i < sizeof(counter) / sizeof(flag); i++) row[3 + i] = peek(&k->calls + i);
        }
        found++;
      }
  return found;
}

EXPORT void sage_shm_reset(context *c) {
  for (int i = 0; i < OPS * ALGORITHMS * BUCKETS; i++) {
    counter *k = atomic_load_explicit(&(&c->counters[0][0][0])[i], memory_order_acquire);
    if (!k) continue;
    for (size_t word = 0; word < sizeof(counter) / sizeof(flag); word++) put(&k->calls + word, 0);
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
