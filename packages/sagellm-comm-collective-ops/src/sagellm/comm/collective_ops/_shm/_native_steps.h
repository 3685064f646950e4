/* Operations: how many steps a call has, and what a rank writes and reads in each. */
#pragma once
#include "_native_flags.h"
#include "_native_fold.h"

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
static void reduce_in_place(context *c) {
  int64_t m = ((c->n + c->world - 1) / c->world + 63) / 64 * 64, low = c->rank * m;
  int64_t end = low + m < c->n ? low + m : c->n;
  char *operands[MAX_RANKS];
  for (; low < end; low += SYMMETRIC_BLOCK) {
    int64_t length = share(end, low, SYMMETRIC_BLOCK);
    for (int r = 0; r < c->world; r++) operands[r] = c->arenas[r] + low;
    sage_shm_fold(c->dtype, c->reduction, c->world, c->out + low, operands, length / ITEM[c->dtype]);
    for (int r = 0; r < c->world; r++)
      if (r != c->rank) memcpy(operands[r], c->out + low, length);
  }
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
        reduce_in_place(c);
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
