/* A decode step of a Llama-like model or a GPT-Neo on a CPU, in which rows never meet.

   A call takes rows. A row is a token, its position, and the cache of its text. The call computes
   the logits of the rows that ask for them. One fixed sequence of operations is computed for a row.
   It depends neither on the other rows of the call nor on which thread computes what.

   - A linear layer's output is a sum over groups of 32 inputs, in their order. A group of 8-bit
     numbers is summed in integers, which do not round. A group of floats has one order too.
   - A row's attention goes over its own keys in blocks of 16 positions, from the first on.
   - Norms, rotary positions and activations look at one row only.

   So a row has the same bits alone, among 32 others, in a prefill, and on any number of threads.
   A text decoded with a draft is then the text decoded without, bit for bit.

   Free threads take chunks of a phase (outputs of a layer, rows, heads). A phase begins when all
   chunks of the phase before are done. A thread that loses its core to another program holds up the
   others. If that happens, fewer threads go on, and more are tried again later. The number of
   threads changes no bits.

   This file knows nothing of files, texts or sampling. specsampling/kernel/engine.py calls it. */

#define _GNU_SOURCE
#include "linear.h"

#include <fenv.h>
#include <float.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <time.h>

enum { MOST_HEAD_DIM = 256, MOST_LAYERS = 512, PHASES = 7 /* of a layer */ };

/* --- what a model is; engine.py has the same structures ------------------------------ */

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
  int32_t cache_format; /* FLOAT32 or FLOAT16 */
  float epsilon, score_scale;
} Model;

/* A text's keys, [layers, key heads, capacity / 16, head_dim, 16], and its values,
   [layers, key heads, capacity, head_padded], in the model's cache_format. */
typedef struct {
  void *keys, *values;
  int32_t capacity; /* a multiple of 16 */
} Cache;

typedef struct {
  const Cache *cache;
  float *logits; /* [vocabulary], or NULL */
  int32_t token, position;
} Row;

/* --- threads -------------------------------------------------------------------------- */

/* How many chunks were taken, and how many are done. Above 24 bits stands the call's number. */
enum { CHUNK_BITS = 24 };
typedef struct { _Atomic uint64_t taken, done; } Phase;

typedef struct { int row, num_rows; } Run; /* rows of one text, one position after the other */

typedef struct {
  const Model *model;
  const Row *rows;
  int num_rows, num_scored;
  int scored[MOST_ROWS];
  int num_runs;
  Run runs[MOST_ROWS];
  bool as_floats, as_rounded, as_numbers; /* which inputs the model's layers read */
  /* A late thread uses these numbers, because the model may be gone already. */
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
  Phase *phase;  /* the next phase */
  float *scores; /* [QUERIES, longest text] */
  Call own;      /* a copy, because the pool may hold the next call already */
} Worker;

struct Pool {
  _Atomic uint64_t call; /* its number, which is even; odd while `now` is written */
  _Atomic bool is_closed;
  _Atomic uint64_t now[CALL_WORDS]; /* a Call */
  int num_workers, longest;
  Phase phases[PHASES * MOST_LAYERS + 2];
  _Atomic int num_active;       /* threads that take chunks now */
  double retry_at, retry_after; /* microseconds: when more threads are tried, and the next wait */
  Worker *workers;
  pthread_mutex_t mutex;
  pthread_cond_t has_work;
  _Atomic int num_asleep;
  /* The residual stream, the queries and the layers' inputs of all rows. */
  float *hidden, *queries;
  Inputs normed, seen, inner;
  int room[3]; /* the widest inputs that there is room for */
};

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

/* Takes a chunk of a phase. Returns -1 if all are taken or the call is over. */
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

/* Halves the threads, because a long wait has shown that one of them lost its core. */
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
  if (active == pool->num_workers) pool->retry_after = FIRST_RETRY; /* no long wait lately */
  else atomic_store(&pool->num_active, 2 * active < pool->num_workers ? 2 * active : pool->num_workers);
  pool->retry_at = now + pool->retry_after;
}

/* Runs the chunks that other threads leave, and waits until the phase is done. */
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

/* --- inputs of linear layers, and chunks of their outputs ------------------------------- */

/* Stores 32 values, a row's inputs from `at` on, as floats and as whole numbers with a scale. The
   floats are rounded to bfloat16 for weights in bfloat16. A
   value that is not finite makes the scale nan. If all values are tiny they become zeros, because
   127 / largest would be infinite. */
INLINE void put_group(const Call *call, Inputs *in, int row, int at, V a, V b) {
  size_t group = (size_t)(at / GROUP) * in->stride + row, place = group * GROUP;
  if (call->as_floats) {
    uint16_t *bits = in->rounded + place;
    vstore(in->floats + place, call->as_rounded ? vbfloat16(a, bits) : a);
    vstore(in->floats + place + LANES, call->as_rounded ? vbfloat16(b, bits + LANES) : b);
  }
  if (!call->as_numbers) return;
  float largest = vmagnitude(a, b);
  bool is_finite = largest <= FLT_MAX;
  if (!is_finite) a = b = vset(0.0f);
  V inverse = vset(is_finite && largest > 0x1p-100f ? 127.0f / largest : 0.0f);
  float scale = is_finite ? largest / 127.0f : NAN;
  int32_t half = vput_bytes(in->numbers + place, vround(vmul(a, inverse)));
  int32_t sum = half + vput_bytes(in->numbers + place + LANES, vround(vmul(b, inverse)));
  in->scales[group] = scale, in->shifts[group] = scale * (float)sum;
  in->minus[group] = -sum, in->halves[group] = -half;
}

/* Returns the blocks of 16 outputs in a chunk: some 32 KB, and a few chunks for each thread. */
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

/* Returns 1 / sqrt(x + eps). It is nan if x has overflowed: no infinite input becomes 0. */
INLINE float inverse_root(float x, float epsilon) {
  return x <= FLT_MAX ? 1.0f / sqrtf(x + epsilon) : NAN;
}

/* Keeps the first few of 16 numbers, and makes the others zeros. */
INLINE V first_of(V a, int num) {
  float values[LANES];
  vstore(values, a);
  for (int i = num > 0 ? num : 0; i < LANES; i++) values[i] = 0.0f;
  return vload(values);
}

/* Computes x / sqrt(mean(x^2) + eps) * weight (RMSNorm). With a bias, the mean is subtracted first
   and the bias is added last (LayerNorm). The padding of x and of the weight is zero. */
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

/* Applies RMSNorm to one head (Qwen3). */
static void norm_head(const Model *m, float *x, const float *weight) {
  V squares = vset(0.0f);
  for (int i = 0; i < m->head_padded; i += LANES) {
    V value = vload(x + i);
    squares = vfma(value, value, squares);
  }
  float factor = inverse_root(vsum(squares) / (float)m->head_dim, m->epsilon);
  for (int i = 0; i < m->head_dim; i++) x[i] = x[i] * factor * weight[i];
}

/* Reads 16 numbers of a table, of embeddings or of learned positions, as floats. */
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

/* Chunk: one row's embedding, and the first layer's norm of it. */
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

/* Chunk: one head of the queries, keys or values of all rows. The head is projected, and queries and
   keys are normed and rotated. Keys and values go into the caches. */
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
      continue;
    }
    uint16_t halves[MOST_HEAD_DIM];
    bool is_half = m->cache_format == FLOAT16;
    for (int i = 0; is_half && i < dim; i += LANES) vput_halves(halves + i, vload(x + i));
    if (kind == 1) {
      size_t at = (part * cache->capacity + (size_t)(position & ~15)) * m->head_dim + (position & 15);
      for (int i = 0; i < m->head_dim; i++, at += LANES) {
        if (is_half) ((uint16_t *)cache->keys)[at] = halves[i];
        else ((float *)cache->keys)[at] = x[i];
      }
    } else {
      size_t size = is_half ? sizeof(uint16_t) : sizeof(float);
      size_t at = (part * cache->capacity + (size_t)position) * dim;
      memcpy((char *)cache->values + at * size, is_half ? (void *)halves : x, dim * size);
    }
  }
}

/* Computes softmax(q k^T) v of N queries that share a key head, [dim] each.

   Keys and values of this layer and head begin at position `at` of the cache. `first` and `end` bound
   the keys that each query sees. All queries go over the blocks of 16 keys together, and each uses
   only its own keys. */
INLINE void attend(const int N, const int format, const Worker *worker, const Cache *cache, size_t at,
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
    size_t block = (at + (size_t)b) * m->head_dim;
    V sum[QUERIES];
    for (int q = 0; q < N; q++) sum[q] = vset(0.0f);
    for (int i = 0; i < m->head_dim; i++) {
      V key = of_table(cache->keys, format, block + (size_t)i * LANES);
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
      size_t value = (at + (size_t)j) * m->head_padded + (size_t)i;
      V v[DIMS];
      for (int d = 0; d < DIMS; d++) v[d] = of_table(cache->values, format, value + (size_t)(d < num ? d : 0) * LANES);
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

/* Returns how many queries of one key head, of successive rows, are attended to at once. */
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
#define ATTEND(format)                                                                             \
  if (num == 1) attend(1, format, worker, cache, part, query, first, end, out);                    \
  else if (num <= QUERIES / 2) attend(QUERIES / 2, format, worker, cache, part, query, first, end, out); \
  else attend(QUERIES, format, worker, cache, part, query, first, end, out)
  if (m->cache_format == FLOAT16) { ATTEND(FLOAT16); }
  else { ATTEND(FLOAT32); }
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

/* Chunk: one row's norm before the MLP. */
static void norm2(Worker *worker, int row, int layer) {
  const Model *m = worker->own.model;
  const Layer *l = m->layers + layer;
  const float *x = worker->pool->hidden + (size_t)row * m->hidden_padded;
  norm_row(&worker->own, x, l->norm2, l->norm2_bias, &worker->pool->normed, row);
}

/* Chunk: 32 numbers inside the MLP: SiLU(gate) * up (SwiGLU, Shazeer 2020). Without a gate they are
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

/* Chunk: one row's norm before the attention of a layer behind the first. */
static void norm1(Worker *worker, int row, int layer) {
  const Model *m = worker->own.model;
  const Layer *l = m->layers + layer;
  const float *x = worker->pool->hidden + (size_t)row * m->hidden_padded;
  norm_row(&worker->own, x, l->norm1, l->norm1_bias, &worker->pool->normed, row);
}

/* Chunk: the last norm of one row whose logits are asked for. */
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

/* Runs one thread's part of a call. */
static void run_call(Worker *worker) {
  const Call *call = &worker->own;
  int rows = call->num_rows;
  worker->phase = worker->pool->phases, worker->is_late = false;
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
  if (shapes) _tile_release(), shapes = NULL;
#endif
}

/* --- calls from outside ------------------------------------------------------------------- */

/* Tells the threads of a call, and returns the call's number. */
static uint64_t publish(Pool *pool, const Call *call) {
  uint64_t words[CALL_WORDS] = {0}, number = atomic_load(&pool->call) + 2;
  memcpy(words, call, sizeof *call);
  atomic_store(&pool->call, number - 1);
  for (int i = 0; i < CALL_WORDS; i++) atomic_store_explicit(pool->now + i, words[i], memory_order_release);
  atomic_store(&pool->call, number);
  return number;
}

/* Copies a call for a thread. Returns false if another call has taken its place meanwhile. */
static bool copy_call(Worker *worker, uint64_t number) {
  Pool *pool = worker->pool;
  uint64_t words[CALL_WORDS];
  for (int i = 0; i < CALL_WORDS; i++) words[i] = atomic_load_explicit(pool->now + i, memory_order_acquire);
  if (atomic_load(&pool->call) != number) return false;
  memcpy(&worker->own, words, sizeof worker->own);
  worker->call = number;
  return true;
}

/* Waits for the next call: spins, then yields, then sleeps. Returns false if the pool is closed. */
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

static void free_inputs(Inputs *in) {
  free(in->floats), free(in->rounded), free(in->numbers), free(in->scales), free(in->minus), free(in->halves), free(in->shifts);
}

static bool make_inputs(Inputs *in, int width, int num_rows, int *room) {
  if (width > *room) {
    size_t all = (size_t)MOST_ROWS * (size_t)width, groups = all / GROUP;
    free_inputs(in);
    *in = (Inputs){.floats = numbers(all, 4), .rounded = numbers(all, 2), .numbers = numbers(all, 1)};
    in->scales = numbers(groups, 4), in->minus = numbers(groups, 4);
    in->halves = numbers(groups, 4), in->shifts = numbers(groups, 4);
    bool is_made = in->floats && in->rounded && in->numbers && in->scales && in->minus && in->halves && in->shifts;
    *room = is_made ? width : 0;
    if (!is_made) return false;
  }
  in->stride = 1;
  while (in->stride < num_rows) in->stride += in->stride < LANES ? in->stride : LANES;
  return true;
}

/* Makes room for a call's rows and for the longest text's scores, while no thread is in a chunk. */
static bool make_room(Pool *pool, const Model *m, int num_rows, int longest) {
  int seen = m->heads * m->head_padded, rows = MOST_ROWS;
  bool is_made = true;
  if (m->hidden_padded > pool->room[0]) {
    free(pool->hidden);
    is_made = (pool->hidden = numbers((size_t)rows * (size_t)m->hidden_padded, 4));
  }
  if (seen > pool->room[1]) {
    free(pool->queries);
    is_made = (pool->queries = numbers((size_t)rows * (size_t)seen, 4)) && is_made;
  }
  is_made = make_inputs(&pool->normed, m->hidden_padded, num_rows, pool->room) && is_made;
  is_made = make_inputs(&pool->seen, seen, num_rows, pool->room + 1) && is_made;
  is_made = make_inputs(&pool->inner, m->inner, num_rows, pool->room + 2) && is_made;
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
  free_inputs(&pool->normed), free_inputs(&pool->seen), free_inputs(&pool->inner);
  free(pool->hidden), free(pool->queries), free(pool->workers), free(pool);
}

/* Makes a pool of threads, with the caller's as one of them. Returns NULL without memory for it. */
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

/* Computes the logits of rows. The rows of a text stand one after the other, and its cache holds
   all positions before them.

   Returns 0, or the problem: -1 the number of rows, -2 a position, -3 a token, -4 memory. */
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
  if (!make_room(pool, model, num_rows, longest)) return -4;
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
      call->as_rounded |= all[j]->numbers && all[j]->format == BFLOAT16;
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
  /* All threads round alike, even if the caller's thread flushes small numbers to zero. */
  fenv_t callers;
  fegetenv(&callers), fesetenv(FE_DFL_ENV);
  own->call = publish(pool, call);
  wake(pool);
  run_call(own);
  fesetenv(&callers);
  return 0;
}
