/* Finds the winner of an exponential race over a vocabulary. specsampling/method/noise.py explains
   the race, and finds the same winner without this file. Philox4x32-10: Salmon et al. 2011. */

#include <math.h>
#include <stdint.h>

enum { AT_ONCE = 256, ROUNDS = 10 };

/* Computes the first two words that Philox makes of (token, position), for each of some tokens. */
static void philox(const uint32_t *key, uint64_t position, const uint32_t *tokens, int num,
                   uint32_t *first, uint32_t *second) {
  for (int i = 0; i < num; i++) {
    uint32_t a = tokens[i], b = (uint32_t)position, c = (uint32_t)(position >> 32), d = 0;
    for (uint32_t round = 0; round < ROUNDS; round++) {
      uint64_t left = (uint64_t)0xD2511F53u * a, right = (uint64_t)0xCD9E8D57u * c;
      a = (uint32_t)(right >> 32) ^ b ^ (key[0] + round * 0x9E3779B9u), b = (uint32_t)right;
      c = (uint32_t)(left >> 32) ^ d ^ (key[1] + round * 0xBB67AE85u), d = (uint32_t)left;
    }
    first[i] = a, second[i] = b;
  }
}

/* Returns a number in (0, 1), an odd multiple of 2^-53. */
static double uniform(uint32_t first, uint32_t second) {
  return (double)((uint64_t)(first >> 6) << 27 | (uint64_t)(second >> 6) << 1 | 1) * 0x1p-53;
}

/* Returns the place of the first of the largest numbers. The lanes are looked at side by side. */
#define FIRST_LARGEST(NAME, NUMBER) \
  static int64_t NAME(const NUMBER *probs, int64_t n) { \
    enum { LANES = 32 }; \
    NUMBER most[LANES] = {0}, largest = 0; \
    int64_t i = 0; \
    for (; i + LANES <= n; i += LANES) \
      for (int lane = 0; lane < LANES; lane++) \
        most[lane] = probs[i + lane] > most[lane] ? probs[i + lane] : most[lane]; \
    for (; i < n; i++) most[0] = probs[i] > most[0] ? probs[i] : most[0]; \
    for (int lane = 0; lane < LANES; lane++) largest = most[lane] > largest ? most[lane] : largest; \
    for (i = 0; i < n - 1 && probs[i] != largest;) i++; \
    return i; \
  }

/* Returns the token with the smallest time -log(1 - u) / p; if two have the same, the lower id.

   tokens: n ids, ascending; NULL for 0 to n - 1. probs: n numbers, at least one above 0. The most
   probable token's time is a bound. No token with u > bound * p wins, since -log(1 - u) >= u. */
#define RACE(NAME, NUMBER) \
  FIRST_LARGEST(largest_of_##NAME, NUMBER) \
  int64_t NAME(const uint32_t *key, uint64_t position, const uint32_t *tokens, \
               const NUMBER *probs, int64_t n) { \
    uint32_t ids[AT_ONCE], first[AT_ONCE], second[AT_ONCE]; \
    int64_t top = largest_of_##NAME(probs, n), winner = -1; \
    ids[0] = tokens ? tokens[top] : (uint32_t)top; \
    philox(key, position, ids, 1, first, second); \
    double bound = -log1p(-uniform(first[0], second[0])) / probs[top], best = INFINITY; \
    for (int64_t start = 0; start < n; start += AT_ONCE) { \
      int num = n - start < AT_ONCE ? (int)(n - start) : AT_ONCE; \
      for (int i = 0; i < num; i++) ids[i] = tokens ? tokens[start + i] : (uint32_t)(start + i); \
      philox(key, position, ids, num, first, second); \
      for (int i = 0; i < num; i++) { \
        double u = uniform(first[i], second[i]), p = probs[start + i]; \
        if (!(p > 0 && u <= bound * p)) continue; \
        double time = -log1p(-u) / p; \
        if (time < best) best = time, winner = ids[i]; \
        if (time < bound) bound = time; \
      } \
    } \
    return winner; \
  }

RACE(race_of_doubles, double)
RACE(race_of_floats, float)
