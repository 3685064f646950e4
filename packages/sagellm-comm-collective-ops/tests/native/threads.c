/* Ranks as threads over one buffer, for tools that watch one process: ThreadSanitizer, an emulator.
 *
 *     threads WORLD ROUNDS
 *     threads folds          every type and reduction on its own, see folds.h
 *
 * Calls of every operation follow one another in an order that all ranks draw from one seed, on
 * slots so small that most take several steps. Every result is compared with one that is computed
 * from all ranks' inputs. A further thread reads statistics while they run.
 */
#include "_native.c"

#include <pthread.h>
#include <stdio.h>
#include <sys/socket.h>

#include "reference.h"
#include "folds.h"

enum { SLOT = 4096, ARENA = 256 << 10, MOST = 3, LONGEST = 5000, TIMEOUT_S = 60 };
enum { KINDS = 13 };

static int world, rounds, ends[MOST][MOST];
static char *segment;
static int64_t data_at, arena_at;
static context *contexts[MOST];
static _Atomic int wrong, running;

static uint32_t draw(uint32_t *state) {
  *state = *state * 1664525u + 1013904223u;
  return *state >> 8;
}

/* Element `i` of what `rank` gives in a round: a small integer, so that sums are exact. */
static float given(int rank, int round, int64_t i) { return (float)((i * 7 + rank * 31 + round * 13) % 101); }

static float summed(int round, int64_t i) {
  float sum = 0;
  for (int r = 0; r < world; r++) sum += given(r, round, i);
  return sum;
}

static void expect(int rank, int round, const char *what, float found, float wanted) {
  if (found == wanted) return;
  if (!atomic_exchange(&wrong, 1)) fprintf(stderr, "rank %d round %d %s: %g, not %g\n", rank, round, what, found, wanted);
}

static void call(int rank, int round, int64_t word, int64_t n, void *in, void *out, const int64_t *aux) {
  context *c = contexts[rank];
  int rc = sage_shm_run(c, word, n, in, out, aux, TIMEOUT_S * INT64_C(1000000000));
  while (rc == AGAIN || rc == INTERRUPTED) rc = sage_shm_resume(c);
  if (rc && !atomic_exchange(&wrong, 1)) {
    int64_t told[4];
    sage_shm_failure(c, told);
    fprintf(stderr, "rank %d round %d: cause %d, rank %d\n", rank, round, (int)told[0], (int)told[1]);
  }
}

static int64_t packed(int op, int reduction, int flags, int root) {
  return op | (int64_t)(F32 + 1) << 8 | (int64_t)reduction << 16 | (int64_t)flags << 24 | (int64_t)(root + 1) << 32;
}

static int64_t uneven(int from, int to, int round) { return (from * 700 + to * 1100 + round * 17) % LONGEST; }

static void one_round(int rank, int round, int kind, int64_t n, int root, float *x, float *y) {
  const char *arena = segment + arena_at + (int64_t)rank * ARENA;
  int64_t bytes = n * 4, i;
  int p;
  switch (kind) {
    case 0: call(rank, round, packed(BARRIER, NONE, 0, -1), 0, 0, 0, 0); break;
    case 1: case 2: case 3: /* one_shot, two_shot and whatever the tuning says */
    case 4: case 5:         /* in the arena, of all ranks or of all but one */
      if (kind == 2 || kind > 3) n = LONGEST - n % 100;
      if (kind == 4 || (kind == 5 && rank != root)) x = (float *)arena;
      if (kind == 1) n = n % 1024 + 1;
      for (i = 0; i < n; i++) x[i] = given(rank, round, i);
      call(rank, round, packed(ALL_REDUCE, SUM, 0, -1), n * 4, 0, x, 0);
      for (i = 0; i < n; i++) expect(rank, round, "all_reduce", x[i], summed(round, i));
      break;
    case 6:
      for (i = 0; i < n; i++) x[i] = given(rank, round, i);
      call(rank, round, packed(ALL_GATHER, NONE, 0, -1), bytes, x, y, 0);
      for (p = 0; p < world; p++)
        for (i = 0; i < n; i++) expect(rank, round, "all_gather", y[p * n + i], given(p, round, i));
      break;
    case 7:
      for (i = 0; i < n * world; i++) x[i] = given(rank, round, i);
      call(rank, round, packed(REDUCE_SCATTER, SUM, 0, -1), bytes * world, x, y, 0);
      for (i = 0; i < n; i++) expect(rank, round, "reduce_scatter", y[i], summed(round, rank * n + i));
      break;
    case 8:
      for (i = 0; i < n; i++) x[i] = rank == root ? given(root, round, i) : -1;
      call(rank, round, packed(BROADCAST, NONE, 0, root), bytes, 0, x, 0);
      for (i = 0; i < n; i++) expect(rank, round, "broadcast", x[i], given(root, round, i));
      break;
    case 9:
      for (i = 0; i < n; i++) x[i] = given(rank, round, i);
      call(rank, round, packed(REDUCE, SUM, 0, root), bytes, 0, x, 0);
      if (rank == root)
        for (i = 0; i < n; i++) expect(rank, round, "reduce", x[i], summed(round, i));
      break;
    case 10: {
      int64_t outs[MOST];
      for (p = 0; p < world; p++) outs[p] = (intptr_t)(y + p * n);
      for (i = 0; i < n; i++) x[i] = given(rank, round, i);
      call(rank, round, packed(GATHER, NONE, 0, root), bytes, x, 0, outs);
      if (rank == root)
        for (p = 0; p < world; p++)
          for (i = 0; i < n; i++) expect(rank, round, "gather", y[p * n + i], given(p, round, i));
      for (p = 0; p < world; p++) outs[p] = (intptr_t)(x + p * n);
      for (i = 0; i < n * world; i++) x[i] = given(root, round, i);
      call(rank, round, packed(SCATTER, NONE, 0, root), bytes, 0, y, outs);
      for (i = 0; i < n; i++) expect(rank, round, "scatter", y[i], given(root, round, rank * n + i));
      break;
    }
    case 11:
      for (i = 0; i < n * world; i++) x[i] = given(rank, round, i);
      call(rank, round, packed(ALL_TO_ALL, NONE, 0, -1), bytes * world, x, y, 0);
      for (p = 0; p < world; p++)
        for (i = 0; i < n; i++) expect(rank, round, "all_to_all", y[p * n + i], given(p, round, rank * n + i));
      break;
    case 12: {
      int64_t table[2 * MOST], at = 0;
      for (p = 0; p < world; p++) {
        table[p] = uneven(rank, p, round) * 4;
        table[world + p] = uneven(p, rank, round) * 4;
        for (i = 0; i < uneven(rank, p, round); i++) x[at++] = given(rank, round, i + p);
      }
      call(rank, round, packed(ALL_TO_ALL, NONE, F_UNEVEN, -1), at * 4, x, y, table);
      for (p = at = 0; p < world; p++)
        for (i = 0; i < uneven(p, rank, round); i++) expect(rank, round, "uneven", y[at++], given(p, round, i + rank));
      break;
    }
  }
}

static void *be(void *number) {
  int rank = (int)(intptr_t)number;
  uint32_t state = 7;
  float *x = malloc(MOST * LONGEST * sizeof(float)), *y = malloc(MOST * LONGEST * sizeof(float));
  for (int round = 0; round < rounds && !atomic_load(&wrong); round++) {
    int kind = (int)(draw(&state) % KINDS), root = (int)(draw(&state) % (unsigned)world);
    one_round(rank, round, round < KINDS ? round : kind, draw(&state) % LONGEST, root, x, y);
  }
  if (atomic_load(&wrong)) sage_shm_poison(contexts[rank], ERROR, "a wrong result");
  free(x);
  free(y);
  atomic_fetch_sub(&running, 1);
  return 0;
}

static void *look(void *rows) {
  while (atomic_load(&running)) {
    sage_shm_totals(contexts[0], rows, OPS * ALGORITHMS * BUCKETS);
    sage_shm_records(contexts[1], rows);
    nanosleep(&(struct timespec){0, 1000000}, 0);
  }
  return 0;
}

/* Two threads of each rank poison at once; every rank's next call fails for one reason. */
static void *spoil(void *c) {
  sage_shm_poison(c, ABORTED, "no more");
  return 0;
}

static void end_badly(void) {
  pthread_t threads[2 * MOST];
  for (int i = 0; i < 2 * world; i++) pthread_create(&threads[i], 0, spoil, contexts[i / 2]);
  for (int i = 0; i < 2 * world; i++) pthread_join(threads[i], 0);
  for (int r = 0; r < world; r++) {
    int64_t told[4];
    expect(r, rounds, "poisoned", sage_shm_run(contexts[r], packed(BARRIER, NONE, 0, -1), 0, 0, 0, 0, 1), FAILED);
    sage_shm_failure(contexts[r], told);
    expect(r, rounds, "cause", (float)told[0], ABORTED);
    expect(r, rounds, "close", (float)sage_shm_close(contexts[r]), 0);
    expect(r, rounds, "closed", sage_shm_run(contexts[r], packed(BARRIER, NONE, 0, -1), 0, 0, 0, 0, 1), FAILED);
    sage_shm_failure(contexts[r], told);
    expect(r, rounds, "cause of closed", (float)told[0], CLOSED);
  }
}

int main(int argc, char **argv) {
  if (argc > 1 && !strcmp(argv[1], "folds")) return folds();
  world = argc > 1 ? atoi(argv[1]) : 2;
  rounds = argc > 2 ? atoi(argv[2]) : 100;
  if (world < 2 || world > MOST) return 2;
  data_at = (CONTROL + world * CONTROL_BYTES + PAGE - 1) / PAGE * PAGE;
  arena_at = data_at + (int64_t)world * 2 * SLOT;
  segment = aligned_alloc(PAGE, arena_at + (int64_t)world * ARENA);
  memset(segment, 0, arena_at + (int64_t)world * ARENA);
  for (int a = 0; a < world; a++)
    for (int b = a + 1; b < world; b++) {
      int pair[2];
      if (socketpair(AF_UNIX, SOCK_STREAM, 0, pair)) return 2;
      ends[a][b] = pair[0];
      ends[b][a] = pair[1];
    }
  pthread_t threads[MOST], looking;
  for (int r = 0; r < world; r++) {
    int32_t fds[MOST];
    for (int p = 0; p < world; p++) fds[p] = p == r ? -1 : ends[r][p];
    contexts[r] = sage_shm_open(segment, r, world, SLOT, data_at, arena_at, ARENA, fds, 20, 1);
    sage_shm_tune(contexts[r], SLOT, SLOT, SLOT / 2, r ? 200000 : 1000, SLOT * 2);
  }
  atomic_store(&running, world);
  void *rows = malloc(OPS * ALGORITHMS * BUCKETS * (7 + HISTOGRAM) * sizeof(int64_t));
  for (intptr_t r = 0; r < world; r++) pthread_create(&threads[r], 0, be, (void *)r);
  pthread_create(&looking, 0, look, rows);
  for (int r = 0; r < world; r++) pthread_join(threads[r], 0);
  pthread_join(looking, 0);
  if (!atomic_load(&wrong)) end_badly();
  for (int r = 0; r < world; r++) sage_shm_free(contexts[r]);
  free(rows);
  free(segment);
  if (!atomic_load(&wrong)) printf("%d rounds of %d ranks\n", rounds, world);
  return atomic_load(&wrong);
}
