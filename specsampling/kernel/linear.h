/* Linear layers of rows that never meet, y = W x + b, in nine formats of weights.

   An output is a sum over groups of 32 inputs, in their order. A group of 8-bit numbers is summed in
   integers, which do not round. This integer is multiplied by the group's scales and added to the
   output. A group of floats is summed from 0, the even ones and the odd ones apart. These two sums
   are added, and then added to the output. That is what AMX does with bfloat16. The order of these
   operations does not depend on the other rows. */

#include "vectors.h"

#include <stdbool.h>
#if defined(__AMX_INT8__) && defined(__AMX_BF16__) && defined(__linux__) && !defined(PLAIN_C)
#define HAS_AMX 1
#include <sys/syscall.h>
#include <unistd.h>
#else
#define HAS_AMX 0
#endif

enum { GROUP = 32, LANES = 16, MOST_ROWS = 128 };

typedef enum { FLOAT32, FLOAT16, BFLOAT16, INT8, Q8_0, Q4_0, Q4_1, Q4_K, Q6_K } Format;

/* y = W x + b. Numbers lie in blocks of 16 outputs, one group of inputs after the other.
   `scales` and `parts` are in the same order: see `scale_of`. */
typedef struct {
  const uint8_t *numbers;
  const void *scales;
  const uint8_t *parts;
  const float *bias; /* or NULL */
  int32_t outputs, inputs, format; /* multiples of 16 and of 32, padded with zeros */
} Linear;

/* The inputs of a linear layer in groups of 32, as floats and as whole numbers with a scale. The
   first group of all rows comes before the second. Each group has room for `stride` rows: those of
   the call, and rows that are computed beside them and ignored. */
typedef struct {
  float *floats;   /* [groups, stride, 32]; rounded to bfloat16 if the weights are */
  uint16_t *rounded; /* [groups, stride, 32]: their bits */
  int8_t *numbers; /* [groups, stride, 32] */
  float *scales;   /* [groups, stride] */
  int32_t *minus;  /* [groups, stride]: minus the sum of the numbers */
  int32_t *halves; /* [groups, stride]: minus the sum of the first 16 numbers */
  float *shifts;   /* [groups, stride]: scale * sum */
  int stride;
} Inputs;

#if HAS_AMX
static bool has_tiles; /* the system may forbid them to a process */
#endif

INLINE int32_t four_of(const int8_t *numbers) {
  int32_t four;
  memcpy(&four, numbers, 4);
  return four;
}

/* Returns the scales of 16 outputs in group g of inputs. In Q4_1 and Q4_K, `other` becomes the
   minimum that is added once per input. In Q6_K it becomes the scales of the group's second half.
   The scales of GGUF files are used as published: a product of two is exact in float32. */
INLINE V scale_of(const Linear *w, int format, size_t block, int g, V *other) {
  size_t group = block * (w->inputs / GROUP) + g, whole = block * (w->inputs / 256) + g / 8;
  const uint16_t *halves = w->scales;
  const uint8_t *parts = w->parts;
  switch (format) {
    case INT8: return vset(1.0f); /* one scale for all groups, which comes at the end */
    case Q4_1:
      *other = vhalf(halves + group * 32 + 16);
      return vhalf(halves + group * 32);
    case Q4_K:
      *other = vmul(vhalf(halves + whole * 32 + 16), vbytes(parts + group * 32 + 16));
      *other = vsub(vset(0.0f), *other);
      return vmul(vhalf(halves + whole * 32), vbytes(parts + group * 32));
    case Q6_K: {
      V both = vhalf(halves + whole * LANES);
      *other = vmul(both, vsigned_bytes((const int8_t *)parts + group * 32 + 16));
      return vmul(both, vsigned_bytes((const int8_t *)parts + group * 32));
    }
    default: return vhalf(halves + group * 16);
  }
}

/* Adds a group of inputs to 16 outputs y of a row. `second` is the sum of its second half. */
INLINE V add_group(const int format, V y, Z sum, Z second, V scale, V other, float factor, float shift) {
  if (format == INT8) return vfma(vfrom(sum), vset(factor), y);
  y = vfma(vfrom(sum), vmul(scale, vset(factor)), y);
  if (format == Q6_K) return vfma(vfrom(second), vmul(other, vset(factor)), y);
  return format == Q4_1 || format == Q4_K ? vfma(other, vset(shift), y) : y;
}

/* Computes 16 outputs of N rows: y[row] = sum over groups of scale * (sum of products).
   `format` and N are constants in each inlined copy, which therefore has no branches on them. */
INLINE void tile(const Linear *w, const int format, const int N, size_t block, const Inputs *in,
                 int row, V *found) {
  const int inputs = w->inputs, stride = in->stride; /* copies, which no store can change */
  V y[TILE];
  for (int r = 0; r < N; r++) y[r] = vset(0.0f);
  if (format == FLOAT32 || format == FLOAT16 || format == BFLOAT16) {
    const float *x = in->floats + (size_t)row * GROUP;
    const uint8_t *p = w->numbers + block * LANES * inputs * (format == FLOAT32 ? 4 : 2);
    for (int g = 0; g < inputs / GROUP; g++, x += stride * GROUP) {
      V evens[TILE], odds[TILE];
      for (int r = 0; r < N; r++) evens[r] = odds[r] = vset(0.0f);
      for (int i = 0; i < GROUP; i += 2) {
        V one, other;
        if (format == BFLOAT16) {
          __builtin_prefetch(p + 2048);
          vpairs(p, &one, &other), p += 64;
        } else if (format == FLOAT16) {
          __builtin_prefetch(p + 2048);
          one = vhalf((const uint16_t *)p), other = vhalf((const uint16_t *)p + LANES), p += 64;
        } else {
          one = vload((const float *)p), other = vload((const float *)p + LANES), p += 128;
        }
        for (int r = 0; r < N; r++) {
          evens[r] = vfma(vset(x[r * GROUP + i]), one, evens[r]);
          odds[r] = vfma(vset(x[r * GROUP + i + 1]), other, odds[r]);
        }
      }
      for (int r = 0; r < N; r++) y[r] = vadd(y[r], vadd(evens[r], odds[r]));
    }
    for (int r = 0; r < N; r++) found[r] = y[r];
    return;
  }
  const int8_t *x = in->numbers + (size_t)row * GROUP;
  const float *scales = in->scales + row, *shifts = in->shifts + row;
  const int32_t *minus = in->minus + row, *halves = in->halves + row;
  const bool is_4_bit = format == Q4_0 || format == Q4_1 || format == Q4_K;
  const uint8_t *p = w->numbers + block * LANES * (is_4_bit ? inputs / 2 : inputs);
  for (int g = 0; g < inputs / GROUP; g++) {
    Z sum[TILE], second[TILE];
    for (int r = 0; r < N; r++) {
      second[r] = zset(0);
      if (format == Q4_0) sum[r] = zscaled(minus + r, 3);
      else if (is_4_bit) sum[r] = zset(0);
      else if (format == Q6_K) sum[r] = zscaled(halves + r, 5), second[r] = zsub(zscaled(minus + r, 5), sum[r]);
      else sum[r] = dot_start(minus + r);
    }
    for (int q = 0; q < GROUP / 4; q++) {
      if (is_4_bit) {
        W both = wload(p), low = wlow(both), high = whigh(both);
        for (int r = 0; r < N; r++) {
          const int8_t *four = x + r * GROUP + 4 * q;
          sum[r] = dot_small(sum[r], low, four_of(four));
          sum[r] = dot_small(sum[r], high, four_of(four + 4));
        }
        q++;
      } else if (format == Q6_K) {
        W numbers = wload(p);
        Z *half = q < 4 ? sum : second;
        for (int r = 0; r < N; r++)
          half[r] = dot_small(half[r], numbers, four_of(x + r * GROUP + 4 * q));
      } else {
        W numbers = wsigned(wload(p));
        for (int r = 0; r < N; r++)
          sum[r] = dot_signed(sum[r], numbers, four_of(x + r * GROUP + 4 * q));
      }
      p += 64;
    }
    V other = vset(0.0f), scale = scale_of(w, format, block, g, &other);
    for (int r = 0; r < N; r++)
      y[r] = add_group(format, y[r], sum[r], second[r], scale, other, scales[r], shifts[r]);
    x += stride * GROUP, scales += stride, shifts += stride, minus += stride, halves += stride;
  }
  V scale = format == INT8 ? vload((const float *)w->scales + block * LANES) : vset(1.0f);
  for (int r = 0; r < N; r++) found[r] = format == INT8 ? vmul(y[r], scale) : y[r];
}

#if HAS_AMX
/* Tiles of AMX: up to 16 rows of 32 inputs, times 32 inputs of 16 outputs. */
typedef struct __attribute__((packed)) {
  uint8_t palette, start_row, reserved[14];
  uint16_t bytes[16];
  uint8_t rows[16];
} TileShapes;

/* Four tiles hold sums, the others inputs and weights. Whole numbers always have 16 rows, bfloat16
   has 1, 2, 4, 8 or 16. The tables are static, because GCC 12 drops stores into one on the stack. */
static const TileShapes BYTES = {
    .palette = 1,
    .bytes = {64, 64, 64, 64, GROUP, GROUP, 64, 64},
    .rows = {16, 16, 16, 16, 16, 16, 8, 8},
};
#define PAIRS(n) {.palette = 1, .bytes = {64, 64, 64, 64, 64, 64}, .rows = {n, n, n, n, n, 16}}
static const TileShapes PAIRS_OF[] = {PAIRS(1), PAIRS(2), PAIRS(4), PAIRS(8), PAIRS(16)};

static __thread const TileShapes *shapes; /* those that this thread's tiles have */

INLINE void use_shapes(const TileShapes *wanted) {
  if (shapes != wanted) _tile_loadconfig(shapes = wanted);
}

/* Compilers do not know that loading a tile reads memory. This keeps earlier stores before it. */
#define MEMORY_IS_READ() __asm__ volatile("" ::: "memory")

/* Does the same as `tile` for up to 64 rows in bfloat16. Each instruction sums a group as described
   at the top of this file. Only numbers below 2^-126, which AMX takes for zeros, may differ. */
INLINE void amx_floats(const Linear *w, size_t block, const Inputs *in, int row, int left, V *found) {
  const int groups = w->inputs / GROUP, stride = in->stride, num = left < 64 ? (left + 15) / 16 : 4;
  const uint16_t *x = in->rounded + (size_t)row * GROUP;
  const uint8_t *p = w->numbers + block * (size_t)groups * 1024;
  int shape = 0;
  while (1 << shape < stride && shape < 4) shape++;
  use_shapes(PAIRS_OF + shape);
  MEMORY_IS_READ();
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int g = 0; g < groups; g++, p += 1024, x += stride * GROUP) {
    for (int i = 0; i < 1024; i += 64) _mm_prefetch((const char *)p + 4096 + i, _MM_HINT_T0);
    _tile_loadd(5, p, 64);
    _tile_loadd(4, x, 64);
    _tile_dpbf16ps(0, 4, 5);
    if (num > 1) { _tile_loadd(4, x + 16 * GROUP, 64); _tile_dpbf16ps(1, 4, 5); }
    if (num > 2) { _tile_loadd(4, x + 32 * GROUP, 64); _tile_dpbf16ps(2, 4, 5); }
    if (num > 3) { _tile_loadd(4, x + 48 * GROUP, 64); _tile_dpbf16ps(3, 4, 5); }
  }
  _tile_stored(0, found, 64);
  if (num > 1) _tile_stored(1, found + 16, 64);
  if (num > 2) _tile_stored(2, found + 32, 64);
  if (num > 3) _tile_stored(3, found + 48, 64);
}

/* Computes tile k of sums, for one group of inputs or half of one. */
#define MULTIPLY(k, x_tile, w_tile)                                                       \
  if (k < num * halves) {                                                                 \
    _tile_zero(k);                                                                        \
    _tile_loadd(x_tile, x + (size_t)(k / halves) * stride * GROUP, GROUP);                \
    _tile_loadd(w_tile, numbers + (halves == 2 ? k / 2 * 768 + k % 2 * 256 : 512 * k), 64); \
    _tile_dpbssd(k, x_tile, w_tile);                                                      \
  }

/* Unpacks the numbers of some groups to signed bytes. In Q6_K each half of a group has its own
   scales, so the halves stand apart: first half, zeros, second half. */
INLINE void unpack(const int format, const uint8_t *p, int num_bytes, uint8_t *to) {
  for (int i = 0; i < num_bytes; i += 64) {
    W numbers = _mm512_loadu_si512(p + i);
    if (format == Q6_K) {
      int place = i / 512 * 768 + i % 512 + (i % 512 < 256 ? 0 : 256);
      _mm512_store_si512(to + place, _mm512_sub_epi8(numbers, _mm512_set1_epi8(32)));
    } else {
      W shift = _mm512_set1_epi8(format == Q4_0 ? 8 : 0);
      _mm512_store_si512(to + 2 * i, _mm512_sub_epi8(wlow(numbers), shift));
      _mm512_store_si512(to + 2 * i + 64, _mm512_sub_epi8(whigh(numbers), shift));
    }
  }
}

/* Does the same as `tile`, for 16 rows and formats of whole numbers. The sums are the same integers
   and are used in the same way, so the bits are the same. Four tiles are summed at once. */
INLINE void amx_tile(const Linear *w, const int format, size_t block, const Inputs *in, int row,
                     V *products) {
  const int groups = w->inputs / GROUP, stride = in->stride;
  const int8_t *x = in->numbers + (size_t)row * GROUP;
  const float *scales = in->scales + row, *shifts = in->shifts + row;
  const bool is_4_bit = format == Q4_0 || format == Q4_1 || format == Q4_K;
  use_shapes(&BYTES);
  const int size = is_4_bit ? 256 : 512, halves = format == Q6_K ? 2 : 1, most = 4 / halves;
  const uint8_t *p = w->numbers + block * (size_t)groups * size;
  int32_t found[4][16 * 16] __attribute__((aligned(64)));
  uint8_t unpacked[4 * 512] __attribute__((aligned(64)));
  if (halves == 2) memset(unpacked, 0, sizeof unpacked);
  V y[16];
  for (int r = 0; r < 16; r++) y[r] = vset(0.0f);
  for (int start = 0; start < groups; start += most, p += most * size, x += most * stride * GROUP) {
    const int num = groups - start < most ? groups - start : most;
    const uint8_t *numbers = p;
    for (int i = 0; i < most * size; i += 64) _mm_prefetch((const char *)p + 4096 + i, _MM_HINT_T0);
    if (is_4_bit || halves == 2) {
      unpack(format, p, num * size, unpacked);
      numbers = unpacked;
      MEMORY_IS_READ();
    }
    MULTIPLY(0, 4, 6);
    MULTIPLY(1, 5, 7);
    MULTIPLY(2, 4, 6);
    MULTIPLY(3, 5, 7);
    _tile_stored(0, found[0], 64);
    _tile_stored(1, found[1], 64);
    _tile_stored(2, found[2], 64);
    _tile_stored(3, found[3], 64);
    for (int k = 0; k < num; k++, scales += stride, shifts += stride) {
      V other = vset(0.0f), scale = scale_of(w, format, block, start + k, &other);
      const int32_t *sums = found[k * halves], *seconds = found[k * halves + halves - 1];
      for (int r = 0; r < 16; r++)
        y[r] = add_group(format, y[r], zload(sums + 16 * r), zload(seconds + 16 * r), scale, other, scales[r], shifts[r]);
    }
  }
  V scale = format == INT8 ? vload((const float *)w->scales + block * LANES) : vset(1.0f);
  for (int r = 0; r < 16; r++) products[r] = format == INT8 ? vmul(y[r], scale) : y[r];
}

#endif

/* Computes 16 outputs of the rows from `row` on, and returns how many rows were computed. These may
   be more than asked for: see `stride` of Inputs. */
#define OF_FORMAT(f)                                              \
  case f:                                                         \
    if (left == 1) tile(w, f, 1, block, in, row, y);              \
    else if (TILE == 2 || left == 2) tile(w, f, 2, block, in, row, y); \
    else if (left <= 4) tile(w, f, TILE / 2, block, in, row, y);  \
    else tile(w, f, TILE, block, in, row, y);                     \
    break
#define OF_FORMAT_AMX(f)                                                     \
  case f:                                                                    \
    if (left > TILE) return amx_tile(w, f, block, in, row, y), 16;           \
    break

static int some_rows(const Linear *w, size_t block, const Inputs *in, int row, int left, V *y) {
#if HAS_AMX
  if (has_tiles) switch (w->format) {
    case BFLOAT16: return amx_floats(w, block, in, row, left, y), 64;
    OF_FORMAT_AMX(INT8);
    OF_FORMAT_AMX(Q8_0);
    OF_FORMAT_AMX(Q4_0);
    OF_FORMAT_AMX(Q4_1);
    OF_FORMAT_AMX(Q4_K);
    OF_FORMAT_AMX(Q6_K);
  }
#endif
  switch (w->format) {
    OF_FORMAT(FLOAT32);
    OF_FORMAT(FLOAT16);
    OF_FORMAT(BFLOAT16);
    OF_FORMAT(INT8);
    OF_FORMAT(Q8_0);
    OF_FORMAT(Q4_0);
    OF_FORMAT(Q4_1);
    OF_FORMAT(Q4_K);
    OF_FORMAT(Q6_K);
  }
  return left == 1 ? 1 : TILE;
}

/* Computes y[row] = W x[row] + b for 16 outputs, or adds it to y[row]. Rows are `stride` apart. */
static void linear(const Linear *w, int block, const Inputs *in, int num_rows, float *y,
                   size_t stride, bool adds) {
  V found[HAS_AMX ? 64 : 16];
  V bias = w->bias ? vload(w->bias + (size_t)block * LANES) : vset(0.0f);
  for (int row = 0; row < num_rows;) {
    int num = some_rows(w, (size_t)block, in, row, num_rows - row, found);
    for (int r = 0; r < num && row + r < num_rows; r++) {
      float *to = y + (size_t)(row + r) * stride;
      V value = w->bias ? vadd(found[r], bias) : found[r];
      vstore(to, adds ? vadd(vload(to), value) : value);
    }
    row += num;
  }
}
