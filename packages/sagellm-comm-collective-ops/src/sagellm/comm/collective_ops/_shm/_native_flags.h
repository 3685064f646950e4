/* Flags of the segment: publishing a step, waiting for the peers', poison. */
#pragma once
#include <errno.h>
#include <poll.h>
#include <sched.h>
#include <string.h>
#include <time.h>

#include "_native_types.h"

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
    if (hold_ns ? now_ns() - start > hold_ns : i >= YIELDS) break;
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
