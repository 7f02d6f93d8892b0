/* A decode step of a Llama-like model or a GPT-Neo on a CPU, in which rows never meet.

   A call takes rows: a token, its position, and the cache of the text it belongs to. It gives
   each row that asks for them its logits. What is computed for a row is one fixed sequence of
   operations: which other rows are in the call, how many there are, and which thread computes
   what does not enter it.

   - A linear layer's output is the sum over groups of 32 inputs, in their order. Within a group
     of 8-bit numbers the sum is one of integers, which do not round.
   - A row's attention goes over its own keys in blocks of 16 positions, from the first on.
   - Norms, rotary positions and activations look at one row only.

   So a row has the same bits alone, among 32 others, in a prefill, and on any number of threads.
   A text decoded with a draft is then the text decoded without, bit for bit.

   Threads take chunks of a phase (outputs of a layer, rows, heads) when they are free, and a
   phase begins when all chunks of the one before are done. A thread that loses its core to
   another program holds up the others until it is back. Where that is seen, fewer threads go on,
   and more are tried again later: how many there are changes no bits.

   Knows nothing of files, texts or sampling. specsampling/kernel/engine.py calls it. */

#define _GNU_SOURCE
#include "vectors.h"

#include <fenv.h>
#include <float.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <time.h>
#if defined(__AMX_INT8__) && defined(__linux__) && !defined(PLAIN_C)
#define HAS_AMX 1
#include <sys/syscall.h>
#include <unistd.h>
#else
#define HAS_AMX 0
#endif

enum { GROUP = 32, LANES = 16, MOST_ROWS = 64, SPARE_ROWS = 16, MOST_HEAD_DIM = 256 };
enum { MOST_LAYERS = 512, PHASES = 7 /* of a layer */ };

/* --- what a model is; engine.py has the same structures ------------------------------ */

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

typedef struct {
  Linear query, key, value, output, gate, up, down; /* without a gate: an MLP of two layers */
  const float *norm1, *norm1_bias, *norm2, *norm2_bias; /* no bias: RMSNorm */
  const float *query_norm, *key_norm;                   /* or NULL */
  int32_t window;                                       /* keys that a row sees; 0: all */
} Layer;

typedef struct {
  const Layer *layers;
  Linear head;
  const float *norm, *norm_bias;
  const float *cos, *sin;         /* [positions, head_dim / 2]; NULL: not rotated */
  const void *embedding;          /* [vocabulary, hidden] */
  const void *learned_positions;  /* [positions, hidden], or NULL */
  const int32_t *head_tokens;     /* which tokens the head scores, or NULL for all */
  int32_t num_layers, vocabulary, head_rows, hidden, hidden_padded, inner;
  int32_t heads, key_heads, head_dim, head_padded;
  int32_t positions, embedding_format, positions_format; /* a Format of plain numbers */
  float epsilon, score_scale;
} Model;

/* A text's keys, [layers, key heads, capacity / 16, head_dim, 16], and its values,
   [layers, key heads, capacity, head_padded]. */
typedef struct {
  float *keys, *values;
  int32_t capacity; /* a multiple of 16 */
} Cache;

typedef struct {
  const Cache *cache;
  float *logits; /* [vocabulary], or NULL */
  int32_t token, position;
} Row;

/* --- threads -------------------------------------------------------------------------- */

/* Chunks that were taken, and that are done; above 24 bits the call that they belong to. */
enum { CHUNK_BITS = 24 };
typedef struct { _Atomic uint64_t taken, done; } Phase;

/* Inputs of a linear layer for each row: floats, and whole numbers in groups with a scale. */
typedef struct {
  float *floats;   /* [rows, width] */
  int8_t *numbers; /* [rows, width] */
  float *scales;   /* [rows, width / 32] */
  int32_t *sums;   /* [rows, width / 16], of the numbers */
  int width;
} Inputs;

typedef struct { int row, num_rows; } Run; /* rows of one text, one position after the other */

typedef struct {
  const Model *model;
  const Row *rows;
  int num_rows, num_scored;
  int scored[MOST_ROWS];
  int num_runs;
  Run runs[MOST_ROWS];
  bool as_floats, as_numbers; /* which inputs the model's layers read */
  /* A thread that is late must not look at a model, which may be gone: it counts by these. */
  int num_layers, num_heads, num_units, num_groups; /* num_groups: of 32 numbers inside of the MLP */
  int output_size, down_size, head_size; /* blocks of 16 outputs that are a chunk */
  int num_output, num_down, num_head;    /* chunks */
} Call;

enum { CALL_WORDS = (sizeof(Call) + 7) / 8 };

typedef struct Pool Pool;

typedef struct {
  Pool *pool;
  pthread_t thread;
  uint64_t call;
  bool is_late;  /* the others have finished the call without it */
  Phase *phase;  /* the next */
  float *scores; /* [QUERIES, longest text] */
  Call own;      /* a copy: the pool's may be of the next call already */
} Worker;

struct Pool {
  _Atomic uint64_t call; /* its number, which is even; odd while `now` is written */
  _Atomic bool is_closed;
  _Atomic uint64_t now[CALL_WORDS]; /* a Call */
  int num_workers, longest;
  Phase phases[PHASES * MOST_LAYERS + 2];
  _Atomic int num_active;       /* threads that take chunks now */
  double retry_at, retry_after; /* microseconds: when more of them are tried, and how long after */
  Worker *workers;
  pthread_mutex_t mutex;
  pthread_cond_t has_work;
  _Atomic int num_asleep;
  /* Of all rows: the residual stream, queries, and inputs of the layers. */
  float *hidden, *queries;
  Inputs normed, seen, inner;
  int room[3]; /* the widest inputs that there is room for */
};

#if HAS_AMX
static bool has_tiles; /* the system may keep them from a process */
#endif

static double microseconds(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return 1e6 * (double)now.tv_sec + 1e-3 * (double)now.tv_nsec;
}

static inline void pause_briefly(void) {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

/* A chunk of a phase, or -1: all are taken, or the call is over. */
static int take(Phase *phase, uint64_t call, int num_chunks) {
  uint64_t seen = atomic_load_explicit(&phase->taken, memory_order_acquire);
  for (;;) {
    uint64_t own = seen >> CHUNK_BITS == call ? seen : call << CHUNK_BITS;
    int chunk = (int)(own & ((1 << CHUNK_BITS) - 1));
    if (seen >> CHUNK_BITS > call || chunk >= num_chunks) return -1;
    if (atomic_compare_exchange_weak(&phase->taken, &seen, own + 1)) return chunk;
  }
}

static void finish(Phase *phase, uint64_t call) {
  uint64_t seen = atomic_load(&phase->done), next;
  do next = (seen >> CHUNK_BITS == call ? seen : call << CHUNK_BITS) + 1;
  while (!atomic_compare_exchange_weak(&phase->done, &seen, next));
}

typedef void Chunk(Worker *worker, int chunk, int layer);

enum { SPINS = 600 /* some 30 microseconds */, LONG_WAIT = 300, FIRST_RETRY = 20000, LAST_RETRY = 1000000 };

static bool is_active(const Worker *worker) {
  return worker - worker->pool->workers < atomic_load_explicit(&worker->pool->num_active, memory_order_relaxed);
}

/* A thread has waited for long: another one has lost its core. Half of them go on. */
static void use_fewer_threads(Pool *pool) {
  int active = atomic_load(&pool->num_active);
  atomic_store(&pool->num_active, active > 1 ? active / 2 : 1);
  pool->retry_at = microseconds() + pool->retry_after;
  pool->retry_after = 2 * pool->retry_after < LAST_RETRY ? 2 * pool->retry_after : LAST_RETRY;
}

static void try_more_threads(Pool *pool) {
  int active = atomic_load(&pool->num_active);
  double now = microseconds();
  if (now < pool->retry_at) return;
  if (active == pool->num_workers) pool->retry_after = FIRST_RETRY; /* long without a long wait */
  else atomic_store(&pool->num_active, 2 * active < pool->num_workers ? 2 * active : pool->num_workers);
  pool->retry_at = now + pool->retry_after;
}

/* Do what others leave of a phase, and wait until all of it is done. */
static void run_phase(Worker *worker, Chunk *run, int num_chunks, int layer) {
  Phase *phase = worker->phase++;
  Pool *pool = worker->pool;
  uint64_t call = worker->call;
  if (worker->is_late) return;
  for (int chunk; is_active(worker) && (chunk = take(phase, call, num_chunks)) >= 0; finish(phase, call))
    run(worker, chunk, layer);
  uint64_t all = call << CHUNK_BITS | (uint64_t)num_chunks;
  double start = 0;
  for (int spins = 0; atomic_load_explicit(&phase->done, memory_order_acquire) != all; spins++) {
    worker->is_late = !is_active(worker) || atomic_load_explicit(&pool->call, memory_order_relaxed) != call;
    if (worker->is_late) return;
    if (spins < SPINS) {
      pause_briefly();
      continue;
    }
    sched_yield();
    if (worker != pool->workers) continue;
    if (start == 0) start = microseconds();
    if (microseconds() - start > LONG_WAIT) use_fewer_threads(pool), start = INFINITY;
  }
}

/* --- inputs and linear layers ----------------------------------------------------------- */

/* Put 32 values, a row's inputs `at` and on: as they are, and as x = scale * whole number. A
   value that is no finite number makes the scale nan. Values that are all next to nothing become
   zeros, for 127 over the largest would be infinite. */
INLINE void put_group(const Call *call, Inputs *in, int row, int at, V a, V b) {
  size_t place = (size_t)row * in->width + at;
  if (call->as_floats) vstore(in->floats + place, a), vstore(in->floats + place + LANES, b);
  if (!call->as_numbers) return;
  float largest = vmagnitude(a, b);
  bool is_finite = largest <= FLT_MAX;
  if (!is_finite) a = b = vset(0.0f);
  V inverse = vset(is_finite && largest > 0x1p-100f ? 127.0f / largest : 0.0f);
  in->scales[place / GROUP] = is_finite ? largest / 127.0f : NAN;
  int32_t *sums = in->sums + place / LANES;
  sums[0] = vput_bytes(in->numbers + place, vround(vmul(a, inverse)));
  sums[1] = vput_bytes(in->numbers + place + LANES, vround(vmul(b, inverse)));
}

INLINE int32_t four_of(const int8_t *numbers) {
  int32_t four;
  memcpy(&four, numbers, 4);
  return four;
}

/* The scales of 16 outputs in group g of inputs, and what is subtracted once per input
   (Q4_1 adds a minimum, Q4_K subtracts one). Formats are those of GGUF files, whose scales stay
   as they are published: products of two of them are exact in float32. */
INLINE V scale_of(const Linear *w, int format, size_t block, int g, V *low) {
  size_t group = block * (w->inputs / GROUP) + g, whole = block * (w->inputs / 256) + g / 8;
  const uint16_t *halves = w->scales;
  switch (format) {
    case Q4_1:
      *low = vhalf(halves + group * 32 + 16);
      return vhalf(halves + group * 32);
    case Q4_K:
      *low = vmul(vhalf(halves + whole * 32 + 16), vbytes(w->parts + group * 32 + 16));
      *low = vsub(vset(0.0f), *low);
      return vmul(vhalf(halves + whole * 32), vbytes(w->parts + group * 32));
    default: return vhalf(halves + group * 16);
  }
}

/* 16 outputs of a few rows: y[row] = sum over groups of scale * (sum of products).
   `format` and N are constants of each copy, so that only one way remains in it. */
INLINE void tile(const Linear *w, const int format, const int N, size_t block, const Inputs *in,
                 int row, V *found) {
  const int inputs = w->inputs, width = in->width; /* copies, which no store can change */
  V y[TILE];
  for (int r = 0; r < N; r++) y[r] = vset(0.0f);
  if (format == FLOAT32 || format == FLOAT16 || format == BFLOAT16) {
    V odd[TILE];
    for (int r = 0; r < N; r++) odd[r] = vset(0.0f);
    const float *x = in->floats + (size_t)row * width;
    const uint8_t *p = w->numbers + block * LANES * inputs * (format == FLOAT32 ? 4 : 2);
    for (int i = 0; i < inputs; i += 2) {
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
        y[r] = vfma(vset(x[(size_t)r * width + i]), one, y[r]);
        odd[r] = vfma(vset(x[(size_t)r * width + i + 1]), other, odd[r]);
      }
    }
    for (int r = 0; r < N; r++) found[r] = vadd(y[r], odd[r]);
    return;
  }
  const int8_t *x = in->numbers + (size_t)row * width;
  const float *scales = in->scales + (size_t)row * (width / GROUP);
  const int32_t *sums = in->sums + (size_t)row * (width / LANES);
  const int num_scales = width / GROUP, num_sums = width / LANES;
  const bool is_4_bit = format == Q4_0 || format == Q4_1 || format == Q4_K;
  const uint8_t *p = w->numbers + block * LANES * (is_4_bit ? inputs / 2 : inputs);
  for (int g = 0; g < inputs / GROUP; g++, x += GROUP) {
    Z sum[TILE], second[TILE];
    for (int r = 0; r < N; r++) {
      int32_t lower = sums[r * num_sums + 2 * g], upper = sums[r * num_sums + 2 * g + 1];
      if (format == Q4_0) sum[r] = zset(-8 * (lower + upper));
      else if (is_4_bit) sum[r] = zset(0);
      else if (format == Q6_K) sum[r] = zset(-32 * lower), second[r] = zset(-32 * upper);
      else sum[r] = dot_start(lower + upper);
    }
    for (int q = 0; q < GROUP / 4; q++) {
      if (is_4_bit) {
        W both = wload(p), low = wlow(both), high = whigh(both);
        for (int r = 0; r < N; r++) {
          const int8_t *four = x + (size_t)r * width + 4 * q;
          sum[r] = dot_small(sum[r], low, four_of(four));
          sum[r] = dot_small(sum[r], high, four_of(four + 4));
        }
        q++;
      } else if (format == Q6_K) {
        W numbers = wload(p);
        Z *half = q < 4 ? sum : second;
        for (int r = 0; r < N; r++)
          half[r] = dot_small(half[r], numbers, four_of(x + (size_t)r * width + 4 * q));
      } else {
        W numbers = wsigned(wload(p));
        for (int r = 0; r < N; r++)
          sum[r] = dot_signed(sum[r], numbers, four_of(x + (size_t)r * width + 4 * q));
      }
      p += 64;
    }
    V low = vset(0.0f), scale = vset(1.0f), scale2 = scale;
    if (format == Q6_K) {
      size_t group = block * (inputs / LANES) + 2 * g;
      V whole = vhalf((const uint16_t *)w->scales + (block * (inputs / 256) + g / 8) * LANES);
      scale = vmul(whole, vsigned_bytes((const int8_t *)w->parts + group * LANES));
      scale2 = vmul(whole, vsigned_bytes((const int8_t *)w->parts + (group + 1) * LANES));
    } else if (format != INT8) {
      scale = scale_of(w, format, block, g, &low);
    }
    for (int r = 0; r < N; r++) {
      V factor = vset(scales[r * num_scales + g]);
      if (format == INT8) {
        y[r] = vfma(vfrom(sum[r]), factor, y[r]);
        continue;
      }
      y[r] = vfma(vfrom(sum[r]), vmul(scale, factor), y[r]);
      if (format == Q6_K) y[r] = vfma(vfrom(second[r]), vmul(scale2, factor), y[r]);
      if (format == Q4_1 || format == Q4_K) {
        int32_t both = sums[r * num_sums + 2 * g] + sums[r * num_sums + 2 * g + 1];
        y[r] = vfma(low, vset(scales[r * num_scales + g] * (float)both), y[r]);
      }
    }
  }
  V scale = format == INT8 ? vload((const float *)w->scales + block * LANES) : vset(1.0f);
  for (int r = 0; r < N; r++) found[r] = format == INT8 ? vmul(y[r], scale) : y[r];
}

#if HAS_AMX
/* Tiles of AMX: 16 rows of 32 inputs, times 32 inputs of 16 outputs, as whole numbers. */
typedef struct __attribute__((packed)) {
  uint8_t palette, start_row, reserved[14];
  uint16_t bytes[16];
  uint8_t rows[16];
} TileShapes;

/* Sums, inputs and weights, each twice. A table: GCC 12 drops stores into one on the stack. */
static const TileShapes SHAPES = {
    .palette = 1,
    .bytes = {[0] = 64, [1] = 64, [4] = GROUP, [5] = 64, [6] = GROUP, [7] = 64},
    .rows = {[0] = 16, [1] = 16, [4] = 16, [5] = 8, [6] = 16, [7] = 8},
};

/* As `tile`, for 16 rows and formats of whole numbers. The sums are the same integers, and what
   becomes of them is the same, so the bits are. */
INLINE void amx_tile(const Linear *w, const int format, size_t block, const Inputs *in, int row,
                     V *products) {
  const int inputs = w->inputs, width = in->width, num_scales = width / GROUP;
  V y[16];
  const int8_t *x = in->numbers + (size_t)row * width;
  const float *scales = in->scales + (size_t)row * num_scales;
  const int32_t *sums = in->sums + (size_t)row * (width / LANES);
  const uint8_t *p = w->numbers + block * LANES * (format == INT8 || format == Q8_0 ? inputs : inputs / 2);
  static __thread int32_t found[2][16 * 16] __attribute__((aligned(64)));
  static __thread uint8_t unpacked[2][8 * 64] __attribute__((aligned(64)));
  for (int r = 0; r < 16; r++) y[r] = vset(0.0f);
  for (int g = 0; g < inputs / GROUP; g += 2) {
    for (int odd = 0; odd < 2; odd++) {
      if (g + odd >= inputs / GROUP) break;
      const uint8_t *numbers = p;
      if (format == INT8 || format == Q8_0) {
        for (int i = 0; i < 512; i += 64) _mm_prefetch((const char *)p + 4096 + i, _MM_HINT_T0);
        p += 512;
      } else {
        for (int q = 0; q < 4; q++, p += 64) {
          W both = wload(p);
          _mm512_store_si512(unpacked[odd] + 128 * q, wlow(both));
          _mm512_store_si512(unpacked[odd] + 128 * q + 64, whigh(both));
        }
        numbers = unpacked[odd];
      }
      if (odd) {
        _tile_zero(1);
        _tile_loadd(7, numbers, 64);
        _tile_loadd(6, x + (g + 1) * GROUP, width);
        _tile_dpbssd(1, 6, 7);
        _tile_stored(1, found[1], 64);
      } else {
        _tile_zero(0);
        _tile_loadd(5, numbers, 64);
        _tile_loadd(4, x + g * GROUP, width);
        _tile_dpbssd(0, 4, 5);
        _tile_stored(0, found[0], 64);
      }
    }
    for (int odd = 0; odd < 2 && g + odd < inputs / GROUP; odd++) {
      V low = vset(0.0f), scale = low;
      if (format != INT8) scale = scale_of(w, format, block, g + odd, &low);
      for (int r = 0; r < 16; r++) {
        const int32_t *both = sums + r * (width / LANES) + 2 * (g + odd);
        V factor = vset(scales[r * num_scales + g + odd]);
        Z sum = zload(found[odd] + 16 * r);
        if (format == Q4_0) sum = _mm512_sub_epi32(sum, zset(8 * (both[0] + both[1])));
        if (format == INT8) {
          y[r] = vfma(vfrom(sum), factor, y[r]);
          continue;
        }
        y[r] = vfma(vfrom(sum), vmul(scale, factor), y[r]);
        if (format == Q4_1 || format == Q4_K)
          y[r] = vfma(low, vset(scales[r * num_scales + g + odd] * (float)(both[0] + both[1])), y[r]);
      }
    }
  }
  V scale = format == INT8 ? vload((const float *)w->scales + block * LANES) : vset(1.0f);
  for (int r = 0; r < 16; r++) products[r] = format == INT8 ? vmul(y[r], scale) : y[r];
}

#endif

/* 16 outputs of rows `row` and on; how many rows were computed. Rows behind the last are there
   (SPARE_ROWS), and what is computed of them is not looked at. */
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
    OF_FORMAT_AMX(INT8);
    OF_FORMAT_AMX(Q8_0);
    OF_FORMAT_AMX(Q4_0);
    OF_FORMAT_AMX(Q4_1);
    OF_FORMAT_AMX(Q4_K);
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

/* y[row] = W x[row] + b for 16 outputs, y's rows `stride` apart; added to what is there, if so. */
static void linear(const Linear *w, int block, const Inputs *in, int num_rows, float *y,
                   size_t stride, bool adds) {
  V found[16];
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

/* How many blocks of 16 outputs are a chunk: some 32 KB, and a few chunks for each thread. */
static int blocks_of_chunk(const Pool *pool, const Linear *w) {
  static const float bytes[] = {4, 2, 2, 1, 1.06f, 0.56f, 0.62f, 0.58f, 1.07f};
  int blocks = w->outputs / LANES;
  int by_size = (int)(32768.0f / (bytes[w->format] * (float)(LANES * w->inputs)));
  int by_share = blocks / (4 * pool->num_workers);
  int chosen = by_size < by_share ? by_size : by_share;
  return chosen > 1 ? chosen : 1;
}

static int num_chunks_of(const Linear *w, int size) {
  return (w->outputs / LANES + size - 1) / size;
}

/* --- the parts of a layer ---------------------------------------------------------------- */

/* 1 / sqrt(x + eps); nan where x has overflowed, so that no infinite input of a norm becomes 0. */
INLINE float inverse_root(float x, float epsilon) {
  return x <= FLT_MAX ? 1.0f / sqrtf(x + epsilon) : NAN;
}

/* The first few of 16 numbers, and zeros. */
INLINE V first_of(V a, int num) {
  float values[LANES];
  vstore(values, a);
  for (int i = num > 0 ? num : 0; i < LANES; i++) values[i] = 0.0f;
  return vload(values);
}

/* x / sqrt(mean(x^2) + eps) * weight (RMSNorm), or with the mean taken away before, and a bias
   added (LayerNorm). Padding of x is zero, and its weight too. */
static void norm_row(const Call *call, const float *x, const float *weight, const float *bias,
                     Inputs *out, int row) {
  const Model *m = call->model;
  int n = m->hidden_padded;
  float mean = 0.0f;
  V sum = vset(0.0f);
  if (bias) {
    for (int i = 0; i < n; i += LANES) sum = vadd(sum, vload(x + i));
    mean = vsum(sum) / (float)m->hidden;
  }
  V centre = vset(mean), squares = vset(0.0f);
  for (int i = 0; i < n; i += LANES) {
    V value = vsub(vload(x + i), centre);
    if (bias && i + LANES > m->hidden) value = first_of(value, m->hidden - i);
    squares = vfma(value, value, squares);
  }
  V factor = vset(inverse_root(vsum(squares) / (float)m->hidden, m->epsilon));
  for (int i = 0; i < n; i += GROUP) {
    V y[2];
    for (int j = 0; j < 2; j++) {
      int at = i + j * LANES;
      y[j] = vmul(vmul(vsub(vload(x + at), centre), factor), vload(weight + at));
      if (bias) y[j] = vadd(y[j], vload(bias + at));
    }
    put_group(call, out, row, i, y[0], y[1]);
  }
}

/* Rotates pairs (i, i + d/2) of a head by position * theta^(-2i/d) (Su et al. 2021). */
static void rotate(const Model *m, float *x, int position) {
  int half = m->head_dim / 2;
  const float *c = m->cos + (size_t)position * half, *s = m->sin + (size_t)position * half;
  for (int i = 0; i < half; i++) {
    float a = x[i], b = x[i + half];
    x[i] = a * c[i] - b * s[i];
    x[i + half] = b * c[i] + a * s[i];
  }
}

/* RMSNorm of one head (Qwen3). */
static void norm_head(const Model *m, float *x, const float *weight) {
  V squares = vset(0.0f);
  for (int i = 0; i < m->head_padded; i += LANES) {
    V value = vload(x + i);
    squares = vfma(value, value, squares);
  }
  float factor = inverse_root(vsum(squares) / (float)m->head_dim, m->epsilon);
  for (int i = 0; i < m->head_dim; i++) x[i] = x[i] * factor * weight[i];
}

/* What a row of a table holds, as floats: an embedding, or a learned position. */
INLINE V of_table(const void *table, int format, size_t at) {
  if (format == FLOAT32) return vload((const float *)table + at);
  if (format == FLOAT16) return vhalf((const uint16_t *)table + at);
  float values[16];
  for (int i = 0; i < 16; i++) {
    uint32_t bits = (uint32_t)((const uint16_t *)table)[at + (size_t)i] << 16;
    memcpy(values + i, &bits, 4);
  }
  return vload(values);
}

/* Chunk: a row. Its embedding, and the first layer's norm of it. */
static void embed(Worker *worker, int row, int layer) {
  const Call *call = &worker->own;
  const Model *m = call->model;
  const Row *asked = call->rows + row;
  float *x = worker->pool->hidden + (size_t)row * m->hidden_padded;
  size_t at = (size_t)asked->token * m->hidden_padded;
  size_t place = (size_t)asked->position * m->hidden_padded;
  for (int i = 0; i < m->hidden_padded; i += LANES) {
    V value = of_table(m->embedding, m->embedding_format, at + (size_t)i);
    if (m->learned_positions)
      value = vadd(value, of_table(m->learned_positions, m->positions_format, place + (size_t)i));
    vstore(x + i, value);
  }
  if (!m->num_layers) return;
  const Layer *l = m->layers + layer;
  norm_row(call, x, l->norm1, l->norm1_bias, &worker->pool->normed, row);
}

/* Chunk: a head of the queries, keys or values, for all rows: projected, normed, rotated; keys
   and values go into the caches. */
static void project(Worker *worker, int head, int layer) {
  const Call *call = &worker->own;
  const Model *m = call->model;
  const Layer *l = m->layers + layer;
  Pool *pool = worker->pool;
  int dim = m->head_padded, kind = 0, of_kind = head;
  if (head >= m->heads) kind = 1, of_kind = head - m->heads;
  if (of_kind >= m->key_heads && kind) kind = 2, of_kind -= m->key_heads;
  const Linear *w = kind == 0 ? &l->query : kind == 1 ? &l->key : &l->value;
  static __thread float found[(MOST_ROWS + 1) * MOST_HEAD_DIM];
  for (int i = 0; i < dim; i += LANES)
    linear(w, (of_kind * dim + i) / LANES, &pool->normed, call->num_rows, found + i, (size_t)dim, false);
  for (int row = 0; row < call->num_rows; row++) {
    float *x = found + (size_t)row * dim;
    int position = call->rows[row].position;
    const Cache *cache = call->rows[row].cache;
    size_t part = (size_t)layer * m->key_heads + (size_t)of_kind;
    if (kind < 2) {
      const float *weight = kind ? l->key_norm : l->query_norm;
      if (weight) norm_head(m, x, weight);
      if (m->cos) rotate(m, x, position);
    }
    if (kind == 0) {
      float *to = pool->queries + ((size_t)row * m->heads + (size_t)of_kind) * dim;
      for (int i = 0; i < dim; i += LANES) vstore(to + i, vmul(vload(x + i), vset(m->score_scale)));
    } else if (kind == 1) {
      float *to = cache->keys + (part * cache->capacity + (size_t)(position & ~15)) * m->head_dim;
      for (int i = 0; i < m->head_dim; i++) to[i * LANES + (position & 15)] = x[i];
    } else {
      memcpy(cache->values + (part * cache->capacity + (size_t)position) * dim, x, sizeof(float) * dim);
    }
  }
}

/* Softmax(q k^T) v of up to N queries that share a key head, [dim] each.

   first, end: of the keys that each query sees. Queries go together over the blocks of 16 keys,
   and each takes what is its own. */
INLINE void attend(const int N, const Worker *worker, const float *keys, const float *values,
                   const float *const *query, const int *first, const int *end, V (*out)[MOST_HEAD_DIM / LANES]) {
  const Model *m = worker->own.model;
  int from = first[0], to = end[0];
  size_t width = (size_t)worker->pool->longest;
  V largest[QUERIES], total[QUERIES];
  float inverse[QUERIES];
  for (int q = 0; q < N; q++) {
    from = first[q] < from ? first[q] : from, to = end[q] > to ? end[q] : to;
    largest[q] = vset(-INFINITY), total[q] = vset(0.0f);
  }
  for (int b = from & ~15; b < to; b += LANES) {
    const float *block = keys + (size_t)b * m->head_dim;
    V sum[QUERIES];
    for (int q = 0; q < N; q++) sum[q] = vset(0.0f);
    for (int i = 0; i < m->head_dim; i++) {
      V key = vload(block + i * LANES);
      for (int q = 0; q < N; q++) sum[q] = vfma(vset(query[q][i]), key, sum[q]);
    }
    for (int q = 0; q < N; q++) {
      float *scores = worker->scores + q * width + b;
      vstore(scores, sum[q]);
      for (int j = 0; b < first[q] && j < LANES && b + j < first[q]; j++) scores[j] = -INFINITY;
      for (int j = end[q] > b ? end[q] - b : 0; j < LANES; j++) scores[j] = -INFINITY;
      largest[q] = vmax(largest[q], vload(scores));
    }
  }
  for (int q = 0; q < N; q++) {
    V shift = vset(vlargest(largest[q]));
    float *scores = worker->scores + q * width;
    for (int b = first[q] & ~15; b < end[q]; b += LANES) {
      V weight = vexp(vsub(vload(scores + b), shift));
      vstore(scores + b, weight);
      for (int j = 0; b < first[q] && j < LANES && b + j < first[q]; j++) scores[b + j] = 0.0f;
      for (int j = end[q] - b; j < LANES; j++) scores[b + j] = 0.0f;
      total[q] = vadd(total[q], vload(scores + b));
    }
    inverse[q] = 1.0f / vsum(total[q]);
  }
  int all_from = first[0], all_to = end[0];
  for (int q = 1; q < N; q++) {
    all_from = first[q] > all_from ? first[q] : all_from;
    all_to = end[q] < all_to ? end[q] : all_to;
  }
  for (int i = 0; i < m->head_padded; i += DIMS * LANES) {
    V sum[QUERIES][DIMS];
    for (int q = 0; q < N; q++)
      for (int d = 0; d < DIMS; d++) sum[q][d] = vset(0.0f);
    int num = (m->head_padded - i) / LANES;
    if (num >= DIMS) num = DIMS;
    for (int j = from; j < to; j++) {
      const float *value = values + (size_t)j * m->head_padded + i;
      V v[DIMS];
      for (int d = 0; d < DIMS; d++) v[d] = vload(value + (d < num ? d : 0) * LANES);
      if (j >= all_from && j < all_to) {
        for (int q = 0; q < N; q++) {
          V weight = vset(worker->scores[q * width + j]);
          for (int d = 0; d < DIMS; d++) sum[q][d] = vfma(weight, v[d], sum[q][d]);
        }
      } else {
        for (int q = 0; q < N; q++) {
          if (j < first[q] || j >= end[q]) continue;
          V weight = vset(worker->scores[q * width + j]);
          for (int d = 0; d < DIMS; d++) sum[q][d] = vfma(weight, v[d], sum[q][d]);
        }
      }
    }
    for (int q = 0; q < N; q++)
      for (int d = 0; d < num; d++) out[q][i / LANES + d] = vmul(sum[q][d], vset(inverse[q]));
  }
}

/* How many queries of one key head, of rows one after the other, are attended to at once. */
static int queries_at_once(const Pool *pool, const Call *call) {
  const Model *m = call->model;
  int all = call->num_rows * m->heads;
  if (all >= 4 * QUERIES * pool->num_workers) return QUERIES;
  return QUERIES > 2 && all >= 6 * pool->num_workers ? QUERIES / 2 : 1;
}

static int units_of(const Pool *pool, const Call *call, const Run *run) {
  int size = queries_at_once(pool, call);
  int queries = run->num_rows * (call->model->heads / call->model->key_heads);
  return (queries + size - 1) / size * call->model->key_heads;
}

static int num_units(const Pool *pool, const Call *call) {
  int num = 0;
  for (int i = 0; i < call->num_runs; i++) num += units_of(pool, call, call->runs + i);
  return num;
}

/* Chunk: a few queries of one key head and one text. */
static void attend_unit(Worker *worker, int unit, int layer) {
  const Call *call = &worker->own;
  const Model *m = call->model;
  Pool *pool = worker->pool;
  const Run *run = call->runs;
  for (int units; unit >= (units = units_of(pool, call, run)); run++) unit -= units;
  int group = m->heads / m->key_heads, size = queries_at_once(pool, call);
  int key_head = unit % m->key_heads, start = unit / m->key_heads * size;
  int num = run->num_rows * group - start < size ? run->num_rows * group - start : size;
  const Cache *cache = call->rows[run->row].cache;
  size_t part = ((size_t)layer * m->key_heads + (size_t)key_head) * (size_t)cache->capacity;
  const float *query[QUERIES];
  int first[QUERIES], end[QUERIES], window = m->layers[layer].window;
  for (int q = 0; q < QUERIES; q++) {
    int of = start + (q < num ? q : num - 1), row = run->row + of / group;
    int head = key_head * group + of % group;
    query[q] = pool->queries + ((size_t)row * m->heads + (size_t)head) * m->head_padded;
    end[q] = call->rows[row].position + 1;
    first[q] = window && end[q] > window ? end[q] - window : 0;
  }
  V out[QUERIES][MOST_HEAD_DIM / LANES];
  const float *keys = cache->keys + part * m->head_dim;
  const float *values = cache->values + part * m->head_padded;
  if (num == 1) attend(1, worker, keys, values, query, first, end, out);
  else if (num <= QUERIES / 2) attend(QUERIES / 2, worker, keys, values, query, first, end, out);
  else attend(QUERIES, worker, keys, values, query, first, end, out);
  for (int q = 0; q < num; q++) {
    int of = start + q, row = run->row + of / group, head = key_head * group + of % group;
    for (int i = 0; i < m->head_padded; i += GROUP)
      put_group(call, &pool->seen, row, head * m->head_padded + i, out[q][i / LANES], out[q][i / LANES + 1]);
  }
}

static void add_blocks(Worker *worker, const Linear *w, const Inputs *in, int chunk, int size) {
  int blocks = w->outputs / LANES;
  size_t stride = (size_t)worker->own.model->hidden_padded;
  for (int block = chunk * size; block < (chunk + 1) * size && block < blocks; block++)
    linear(w, block, in, worker->own.num_rows, worker->pool->hidden + (size_t)block * LANES, stride, true);
}

/* Chunk: some outputs of the attention's last layer, added to the residual stream. */
static void add_attention(Worker *worker, int chunk, int layer) {
  const Call *call = &worker->own;
  add_blocks(worker, &call->model->layers[layer].output, &worker->pool->seen, chunk, call->output_size);
}

/* Chunk: a row. The norm before the MLP. */
static void norm2(Worker *worker, int row, int layer) {
  const Model *m = worker->own.model;
  const Layer *l = m->layers + layer;
  const float *x = worker->pool->hidden + (size_t)row * m->hidden_padded;
  norm_row(&worker->own, x, l->norm2, l->norm2_bias, &worker->pool->normed, row);
}

/* Chunk: 32 numbers inside of the MLP. SwiGLU: SiLU(gate) * up (Shazeer 2020); without a gate
   gelu_new(up), which is x / (1 + exp(-2 sqrt(2 / pi) (x + 0.044715 x^3))). */
static void widen(Worker *worker, int chunk, int layer) {
  const Call *call = &worker->own;
  const Layer *l = call->model->layers + layer;
  Pool *pool = worker->pool;
  static __thread float gates[MOST_ROWS * GROUP], ups[MOST_ROWS * GROUP];
  bool is_gated = l->gate.numbers != NULL;
  for (int half = 0; half < 2; half++) {
    int block = 2 * chunk + half, at = half * LANES;
    if (is_gated) linear(&l->gate, block, &pool->normed, call->num_rows, gates + at, GROUP, false);
    linear(&l->up, block, &pool->normed, call->num_rows, ups + at, GROUP, false);
  }
  for (int row = 0; row < call->num_rows; row++) {
    V y[2];
    for (int half = 0; half < 2; half++) {
      V up = vload(ups + row * GROUP + half * LANES);
      if (is_gated) {
        V gate = vload(gates + row * GROUP + half * LANES);
        y[half] = vmul(vgated(gate, gate), up);
      } else {
        V cube = vmul(vmul(up, up), up);
        V inside = vmul(vset(1.59576912f), vfma(vset(0.044715f), cube, up));
        y[half] = vgated(up, inside);
      }
    }
    put_group(call, &pool->inner, row, chunk * GROUP, y[0], y[1]);
  }
}

/* Chunk: some outputs of the MLP's last layer, added to the residual stream. */
static void add_mlp(Worker *worker, int chunk, int layer) {
  const Call *call = &worker->own;
  add_blocks(worker, &call->model->layers[layer].down, &worker->pool->inner, chunk, call->down_size);
}

/* Chunk: a row. The norm before the next layer's attention. */
static void norm1(Worker *worker, int row, int layer) {
  const Model *m = worker->own.model;
  const Layer *l = m->layers + layer;
  const float *x = worker->pool->hidden + (size_t)row * m->hidden_padded;
  norm_row(&worker->own, x, l->norm1, l->norm1_bias, &worker->pool->normed, row);
}

/* Chunk: a row whose logits are asked for. The last norm. */
static void last_norm(Worker *worker, int i, int layer) {
  const Model *m = worker->own.model;
  const float *x = worker->pool->hidden + (size_t)worker->own.scored[i] * m->hidden_padded;
  (void)layer;
  norm_row(&worker->own, x, m->norm, m->norm_bias, &worker->pool->normed, i);
}

/* Chunk: some tokens' logits, for all rows that ask for them. */
static void score_tokens(Worker *worker, int chunk, int layer) {
  const Call *call = &worker->own;
  const Model *m = call->model;
  Pool *pool = worker->pool;
  (void)layer;
  static __thread float found[MOST_ROWS * LANES];
  int size = call->head_size, blocks = m->head.outputs / LANES;
  for (int block = chunk * size; block < (chunk + 1) * size && block < blocks; block++) {
    linear(&m->head, block, &pool->normed, call->num_scored, found, LANES, false);
    int left = m->head_rows - block * LANES < LANES ? m->head_rows - block * LANES : LANES;
    for (int i = 0; i < call->num_scored; i++) {
      float *logits = call->rows[call->scored[i]].logits;
      const float *of_row = found + i * LANES;
      if (m->head_tokens)
        for (int j = 0; j < left; j++) logits[m->head_tokens[block * LANES + j]] = of_row[j];
      else memcpy(logits + (size_t)block * LANES, of_row, sizeof(float) * (size_t)left);
    }
  }
}

/* One call, as each thread runs it. */
static void run_call(Worker *worker) {
  const Call *call = &worker->own;
  int rows = call->num_rows;
  worker->phase = worker->pool->phases, worker->is_late = false;
#if HAS_AMX
  _tile_loadconfig(&SHAPES);
#endif
  run_phase(worker, embed, rows, 0);
  for (int layer = 0; layer < call->num_layers; layer++) {
    if (layer) run_phase(worker, norm1, rows, layer);
    run_phase(worker, project, call->num_heads, layer);
    run_phase(worker, attend_unit, call->num_units, layer);
    run_phase(worker, add_attention, call->num_output, layer);
    run_phase(worker, norm2, rows, layer);
    run_phase(worker, widen, call->num_groups, layer);
    run_phase(worker, add_mlp, call->num_down, layer);
  }
  if (call->num_scored) {
    run_phase(worker, last_norm, call->num_scored, 0);
    run_phase(worker, score_tokens, call->num_head, 0);
  }
#if HAS_AMX
  if (has_tiles) _tile_release();
#endif
}

/* --- calls from outside ------------------------------------------------------------------- */

/* Tell the threads of a call. Returns its number. */
static uint64_t publish(Pool *pool, const Call *call) {
  uint64_t words[CALL_WORDS] = {0}, number = atomic_load(&pool->call) + 2;
  memcpy(words, call, sizeof *call);
  atomic_store(&pool->call, number - 1);
  for (int i = 0; i < CALL_WORDS; i++) atomic_store_explicit(pool->now + i, words[i], memory_order_release);
  atomic_store(&pool->call, number);
  return number;
}

/* Copy the call that is on, unless another one takes its place meanwhile. */
static bool copy_call(Worker *worker, uint64_t number) {
  Pool *pool = worker->pool;
  uint64_t words[CALL_WORDS];
  for (int i = 0; i < CALL_WORDS; i++) words[i] = atomic_load_explicit(pool->now + i, memory_order_acquire);
  if (atomic_load(&pool->call) != number) return false;
  memcpy(&worker->own, words, sizeof worker->own);
  worker->call = number;
  return true;
}

/* Wait for the next call: spin, then give way, then sleep. */
static bool wait_for_call(Worker *worker) {
  Pool *pool = worker->pool;
  double start = microseconds();
  for (int spins = 0;; spins++) {
    if (atomic_load(&pool->is_closed)) return false;
    uint64_t call = atomic_load(&pool->call);
    bool is_new = call != worker->call && call % 2 == 0 && is_active(worker);
    if (is_new && copy_call(worker, call)) return true;
    if (spins < 600) {
      pause_briefly();
    } else if (microseconds() - start < 3000) {
      sched_yield();
    } else {
      pthread_mutex_lock(&pool->mutex);
      atomic_fetch_add(&pool->num_asleep, 1);
      while ((atomic_load(&pool->call) == worker->call || !is_active(worker)) && !atomic_load(&pool->is_closed))
        pthread_cond_wait(&pool->has_work, &pool->mutex);
      atomic_fetch_sub(&pool->num_asleep, 1);
      pthread_mutex_unlock(&pool->mutex);
    }
  }
}

static void *work(void *argument) {
  Worker *worker = argument;
  fesetenv(FE_DFL_ENV);
  while (wait_for_call(worker)) run_call(worker);
  return NULL;
}

static void wake(Pool *pool) {
  if (!atomic_load(&pool->num_asleep) || atomic_load(&pool->num_active) == 1) return;
  pthread_mutex_lock(&pool->mutex);
  pthread_cond_broadcast(&pool->has_work);
  pthread_mutex_unlock(&pool->mutex);
}

static void *numbers(size_t count, size_t size) {
  size_t bytes = (count * size + 63) / 64 * 64;
  void *made = aligned_alloc(64, bytes ? bytes : 64);
  if (made) memset(made, 0, bytes);
  return made;
}

static bool make_inputs(Inputs *in, int width, int *room) {
  in->width = width;
  if (width <= *room) return true;
  size_t all = (size_t)(MOST_ROWS + SPARE_ROWS) * (size_t)width;
  free(in->floats), free(in->numbers), free(in->scales), free(in->sums);
  *in = (Inputs){numbers(all, 4), numbers(all, 1), numbers(all / GROUP, 4), numbers(all / LANES, 4), width};
  bool is_made = in->floats && in->numbers && in->scales && in->sums;
  *room = is_made ? width : 0;
  return is_made;
}

/* Room for a model's rows, and for the scores of the longest text. No thread is in a chunk. */
static bool make_room(Pool *pool, const Model *m, int longest) {
  int seen = m->heads * m->head_padded, rows = MOST_ROWS + SPARE_ROWS;
  bool is_made = true;
  if (m->hidden_padded > pool->room[0]) {
    free(pool->hidden);
    is_made = (pool->hidden = numbers((size_t)rows * (size_t)m->hidden_padded, 4));
  }
  if (seen > pool->room[1]) {
    free(pool->queries);
    is_made = (pool->queries = numbers((size_t)rows * (size_t)seen, 4)) && is_made;
  }
  is_made = make_inputs(&pool->normed, m->hidden_padded, pool->room) && is_made;
  is_made = make_inputs(&pool->seen, seen, pool->room + 1) && is_made;
  is_made = make_inputs(&pool->inner, m->inner, pool->room + 2) && is_made;
  if (!is_made) memset(pool->room, 0, sizeof pool->room);
  if (!is_made || longest <= pool->longest) return is_made;
  int width = (longest + 1023) / 1024 * 1024;
  for (int i = 0; i < pool->num_workers; i++) {
    free(pool->workers[i].scores);
    pool->workers[i].scores = numbers((size_t)QUERIES * (size_t)width, 4);
    is_made = is_made && pool->workers[i].scores;
  }
  pool->longest = is_made ? width : 0;
  return is_made;
}

const char *kind(void) { return HAS_AMX ? KIND " and AMX" : KIND; }

int most_rows(void) { return MOST_ROWS; }

void close_pool(Pool *pool) {
  atomic_store(&pool->is_closed, true);
  pthread_mutex_lock(&pool->mutex);
  pthread_cond_broadcast(&pool->has_work);
  pthread_mutex_unlock(&pool->mutex);
  for (int i = 1; i < pool->num_workers; i++) pthread_join(pool->workers[i].thread, NULL);
  for (int i = 0; i < pool->num_workers; i++) free(pool->workers[i].scores);
  Inputs *all[] = {&pool->normed, &pool->seen, &pool->inner};
  for (int i = 0; i < 3; i++)
    free(all[i]->floats), free(all[i]->numbers), free(all[i]->scales), free(all[i]->sums);
  free(pool->hidden), free(pool->queries), free(pool->workers), free(pool);
}

/* A pool of threads, the caller's one of them; NULL if there is no memory for it. */
Pool *open_pool(int num_threads) {
  Pool *pool = num_threads > 0 ? calloc(1, sizeof(Pool)) : NULL;
  if (!pool) return NULL;
  pool->workers = calloc((size_t)num_threads, sizeof(Worker));
  if (!pool->workers) return free(pool), NULL;
#if HAS_AMX
  has_tiles = !syscall(SYS_arch_prctl, 0x1023, 18); /* ARCH_REQ_XCOMP_PERM, for this process */
#endif
  pthread_mutex_init(&pool->mutex, NULL);
  pthread_cond_init(&pool->has_work, NULL);
  pool->num_workers = 1;
  for (int i = 0; i < num_threads; i++) {
    pool->workers[i].pool = pool;
    if (!i) continue;
    if (pthread_create(&pool->workers[i].thread, NULL, work, pool->workers + i)) break;
    pool->num_workers++;
  }
  atomic_store(&pool->num_active, pool->num_workers);
  pool->retry_after = FIRST_RETRY;
  return pool;
}

static bool is_whole_number(const Linear *w) { return w->numbers && w->format >= INT8; }
static bool is_float(const Linear *w) { return w->numbers && w->format < INT8; }

/* Logits of rows. Rows of one text stand one after the other, and its cache holds what comes
   before them.

   Returns 0, or what is wrong: -1 the number of rows, -2 a position, -3 a token, -4 memory. */
int step(Pool *pool, const Model *model, const Row *rows, int num_rows) {
  if (num_rows < 1 || num_rows > MOST_ROWS || model->num_layers > MOST_LAYERS) return -1;
  Worker *own = pool->workers;
  Call *call = &own->own;
  int longest = 0, num_runs = 0;
  for (int i = 0; i < num_rows; i++) {
    const Row *row = rows + i;
    if (row->position < 0 || row->position >= row->cache->capacity) return -2;
    if ((model->cos || model->learned_positions) && row->position >= model->positions) return -2;
    if (row->token < 0 || row->token >= model->vocabulary) return -3;
    if (row->position + 16 > longest) longest = row->position + 16;
  }
  if (!make_room(pool, model, longest)) return -4;
  memset(call, 0, sizeof *call);
  call->model = model, call->rows = rows, call->num_rows = num_rows;
  for (int i = 0; i < num_rows; i++) {
    if (rows[i].logits) call->scored[call->num_scored++] = i;
    bool goes_on = i && rows[i].cache == rows[i - 1].cache && rows[i].position == rows[i - 1].position + 1;
    if (!goes_on) call->runs[num_runs++] = (Run){i, 0};
    call->runs[num_runs - 1].num_rows++;
  }
  call->num_runs = num_runs;
  for (int i = 0; i <= model->num_layers; i++) {
    const Layer *l = model->layers + i;
    const Linear *all[] = {&l->query, &l->key, &l->value, &l->output, &l->gate, &l->up, &l->down};
    int num = i < model->num_layers ? 7 : 1;
    if (num == 1) all[0] = &model->head;
    for (int j = 0; j < num; j++) {
      call->as_numbers |= is_whole_number(all[j]);
      call->as_floats |= is_float(all[j]);
    }
  }
  try_more_threads(pool);
  const Layer *first = model->layers;
  call->num_layers = model->num_layers, call->num_heads = model->heads + 2 * model->key_heads;
  call->num_units = num_units(pool, call), call->num_groups = model->inner / GROUP;
  call->head_size = blocks_of_chunk(pool, &model->head);
  call->num_head = num_chunks_of(&model->head, call->head_size);
  if (model->num_layers) {
    call->output_size = blocks_of_chunk(pool, &first->output);
    call->down_size = blocks_of_chunk(pool, &first->down);
    call->num_output = num_chunks_of(&first->output, call->output_size);
    call->num_down = num_chunks_of(&first->down, call->down_size);
  }
  /* All threads round alike, whatever the caller's flushes to zero. */
  fenv_t callers;
  fegetenv(&callers), fesetenv(FE_DFL_ENV);
  own->call = publish(pool, call);
  wake(pool);
  run_call(own);
  fesetenv(&callers);
  return 0;
}
