/* The kernel without Python: makes small models of whole numbers alone, packs them in all
   formats, runs calls of several widths on several threads, and prints a hash of the logits for
   each format. Processors and compilers must print the same. Compile it with pack.c.

   Exits with 1 if a row's bits depend on its call. */

#include "step.c"

#include <stdio.h>

int pack_plain(int format, const void *source, int source_format, int width, const int32_t *rows,
               const int32_t *columns, int inputs, int from, int to, uint8_t *numbers, void *scales,
               float *room);
void pack_blocks(int format, const uint8_t *source, int64_t row_bytes, const int32_t *rows, int inputs,
                 int from, int to, uint8_t *numbers, uint16_t *scales, uint8_t *parts);

enum { TEXT = 150, VOCABULARY = 83, NUM_LAYERS = 2, CAPACITY = 160, MOST_THREADS = 4 };

static uint64_t counter;

/* Splitmix64 of a counter. */
static uint32_t next(void) {
  uint64_t x = (counter += 0x9e3779b97f4a7c15u);
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u, x = (x ^ x >> 27) * 0x94d049bb133111ebu;
  return (uint32_t)((x ^ x >> 31) >> 32);
}

/* From -scale to scale, in steps that float32 holds. */
static float number(float scale) { return (float)((int32_t)(next() >> 8) - (1 << 23)) * 0x1p-23f * scale; }

static void *made[4096];
static int num_made;

static void *room(size_t bytes) { return made[num_made++] = numbers(bytes, 1); }

static float *vector(int size, int padded, float middle) {
  float *v = room(4 * (size_t)padded);
  for (int i = 0; i < size; i++) v[i] = middle + number(0.5f);
  return v;
}

static uint16_t half_of_scale(void) { return (uint16_t)((next() & 0x83ff) | (6 + next() % 4) << 10); }

/* A file's row of a format: any bytes, with scales that are no infinite numbers. */
static void fill_blocks(int format, uint8_t *p, int inputs) {
  static const int bytes_of[] = {[Q8_0] = 34, [Q4_0] = 18, [Q4_1] = 20, [Q4_K] = 144, [Q6_K] = 210};
  int bytes = bytes_of[format], blocks = inputs / (format >= Q4_K ? 256 : 32);
  for (int b = 0; b < blocks; b++, p += bytes) {
    for (int i = 0; i < bytes; i++) p[i] = (uint8_t)next();
    uint16_t scales[2] = {half_of_scale(), half_of_scale()};
    memcpy(format == Q6_K ? p + 208 : p, scales, format == Q4_1 || format == Q4_K ? 4 : 2);
  }
}

/* [outputs, inputs], the heads of its rows or columns padded. */
static Linear matrix(int format, int outputs, int inputs, const int32_t *rows, int num_rows,
                     const int32_t *columns, int num_columns, bool has_bias) {
  Linear w = {.outputs = (num_rows + 15) / 16 * 16, .inputs = (num_columns + 31) / 32 * 32, .format = format};
  size_t all = (size_t)w.outputs * (size_t)w.inputs;
  int32_t *order = room(4 * (size_t)w.outputs), *across = room(4 * (size_t)w.inputs);
  for (int i = 0; i < w.outputs; i++) order[i] = i < num_rows ? rows ? rows[i] : i : -1;
  for (int i = 0; i < w.inputs; i++) across[i] = i < num_columns ? columns ? columns[i] : i : -1;
  uint8_t *packed = room(4 * all), *parts = room(all), *scales = room(4 * all);
  if (format <= INT8 || format == Q4_0) {
    float *source = room(4 * (size_t)outputs * (size_t)inputs), *one = room(4 * (size_t)w.inputs);
    for (int i = 0; i < outputs * inputs; i++) source[i] = number(2.0f / sqrtf((float)inputs));
    for (int i = 0; i < w.outputs; i += 16)
      if (pack_plain(format, source, FLOAT32, inputs, order, across, w.inputs, i, i + 16, packed, scales, one))
        abort();
  } else {
    size_t bytes = (size_t)inputs * 2;
    uint8_t *source = room(bytes * (size_t)outputs);
    for (int i = 0; i < outputs; i++) fill_blocks(format, source + (size_t)i * bytes, inputs);
    pack_blocks(format, source, (int64_t)bytes, order, w.inputs, 0, w.outputs, packed, (uint16_t *)scales, parts);
  }
  w.numbers = packed, w.scales = scales, w.parts = parts;
  if (has_bias) w.bias = vector(num_rows, w.outputs, 0.0f);
  return w;
}

typedef struct { int hidden, inner, heads, key_heads, head_dim, window; bool is_neo; } Shape;

static Model model_of(int format, Shape s, Layer *layers) {
  int padded = (s.head_dim + 31) / 32 * 32;
  Model m = {.layers = layers, .num_layers = NUM_LAYERS, .vocabulary = VOCABULARY, .head_rows = VOCABULARY,
             .hidden = s.hidden, .hidden_padded = (s.hidden + 31) / 32 * 32, .inner = (s.inner + 31) / 32 * 32,
             .heads = s.heads, .key_heads = s.key_heads, .head_dim = s.head_dim, .head_padded = padded,
             .positions = CAPACITY, .epsilon = 1e-5f, .score_scale = 0.25f,
             .cache_format = format == FLOAT32 ? FLOAT32 : FLOAT16};
  int32_t *heads = room(4 * (size_t)(s.heads * padded)), *wide = room(4 * (size_t)m.inner);
  for (int i = 0; i < s.heads * padded; i++)
    heads[i] = i % padded < s.head_dim ? i / padded * s.head_dim + i % padded : -1;
  for (int i = 0; i < m.inner; i++) wide[i] = i < s.inner ? i : -1;
  int q = s.heads * s.head_dim, k = s.key_heads * s.head_dim, across = s.heads * padded;
  for (int i = 0; i < NUM_LAYERS; i++) {
    Layer *l = layers + i;
    *l = (Layer){.window = i % 2 ? s.window : 0};
    l->query = matrix(format, q, s.hidden, heads, s.heads * padded, NULL, s.hidden, true);
    l->key = matrix(format, k, s.hidden, heads, s.key_heads * padded, NULL, s.hidden, true);
    l->value = matrix(format, k, s.hidden, heads, s.key_heads * padded, NULL, s.hidden, false);
    l->output = matrix(format, s.hidden, q, NULL, s.hidden, heads, across, s.is_neo);
    if (!s.is_neo) l->gate = matrix(format, s.inner, s.hidden, wide, m.inner, NULL, s.hidden, false);
    l->up = matrix(format, s.inner, s.hidden, wide, m.inner, NULL, s.hidden, s.is_neo);
    l->down = matrix(format, s.hidden, s.inner, NULL, s.hidden, NULL, s.inner, true);
    l->norm1 = vector(s.hidden, m.hidden_padded, 1.0f), l->norm2 = vector(s.hidden, m.hidden_padded, 1.0f);
    if (s.is_neo) {
      l->norm1_bias = vector(s.hidden, m.hidden_padded, 0.0f);
      l->norm2_bias = vector(s.hidden, m.hidden_padded, 0.0f);
    } else {
      l->query_norm = vector(s.head_dim, padded, 1.0f), l->key_norm = vector(s.head_dim, padded, 1.0f);
    }
  }
  m.norm = vector(s.hidden, m.hidden_padded, 1.0f);
  m.head = matrix(format, VOCABULARY, s.hidden, NULL, VOCABULARY, NULL, s.hidden, false);
  /* Any bits that are no infinite numbers: 16-bit tables of both kinds. */
  uint16_t *table = room(2 * (size_t)VOCABULARY * (size_t)m.hidden_padded);
  m.embedding = table, m.embedding_format = s.is_neo ? FLOAT16 : BFLOAT16;
  for (int i = 0; i < VOCABULARY * m.hidden_padded; i++)
    if (i % m.hidden_padded < s.hidden)
      table[i] = (uint16_t)((next() & 0x83ff) | (s.is_neo ? 11 + next() % 4 : 0x3c00 >> 10) << 10);
  if (s.is_neo) {
    float *places = room(4 * (size_t)CAPACITY * (size_t)m.hidden_padded);
    for (int i = 0; i < CAPACITY * m.hidden_padded; i++)
      if (i % m.hidden_padded < s.hidden) places[i] = number(1.0f);
    m.learned_positions = places, m.norm_bias = vector(s.hidden, m.hidden_padded, 0.0f);
  } else { /* no rotation, but any numbers will do */
    m.cos = vector(CAPACITY * s.head_dim / 2, CAPACITY * s.head_dim / 2, 0.0f);
    m.sin = vector(CAPACITY * s.head_dim / 2, CAPACITY * s.head_dim / 2, 0.0f);
  }
  return m;
}

static Cache cache_of(const Model *m) {
  size_t all = (size_t)m->num_layers * (size_t)m->key_heads * CAPACITY;
  return (Cache){room(4 * all * (size_t)m->head_dim), room(4 * all * (size_t)m->head_padded), CAPACITY};
}

/* A text in calls of `width` rows; 0: of changing numbers, beside rows of another text. */
static void decode(Pool *pool, const Model *m, int width, float *logits) {
  Cache cache = cache_of(m), other = cache_of(m);
  Row rows[MOST_ROWS];
  for (int at = 0, call = 0; at < TEXT; call++) {
    int wanted = width ? width : 1 + call * 7 % 33, num = 0, beside = width ? 0 : call % 5;
    for (; num < beside; num++) rows[num] = (Row){&other, NULL, num * 5 % VOCABULARY, num};
    for (int i = 0; i < wanted && at < TEXT; i++, at++)
      rows[num++] = (Row){&cache, logits + (size_t)at * VOCABULARY, at * at % VOCABULARY, at};
    if (step(pool, m, rows, num)) abort();
  }
}

static int check_errors(Pool *pool, const Model *m) {
  Cache cache = cache_of(m);
  Row good = {&cache, NULL, 1, 1}, rows[MOST_ROWS + 1];
  for (int i = 0; i <= MOST_ROWS; i++) rows[i] = good;
  Row bad[] = {{&cache, NULL, -1, 1}, {&cache, NULL, VOCABULARY, 1}, {&cache, NULL, 1, -1}, {&cache, NULL, 1, CAPACITY}};
  int num = step(pool, m, rows, 0) == -1 && step(pool, m, rows, MOST_ROWS + 1) == -1;
  for (int i = 0; i < 4; i++) num += step(pool, m, bad + i, 1) == (i < 2 ? -3 : -2);
  return num == 5 ? 0 : 1;
}

int main(void) {
  static const char *names[] = {"float32", "float16", "bfloat16", "int8", "Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q6_K"};
  static const Shape shapes[] = {{40, 72, 4, 2, 20, 24, false}, {72, 90, 3, 3, 8, 17, true}, {40, 100, 6, 1, 80, 0, false}};
  static const Shape whole = {256, 512, 4, 2, 64, 33, false}; /* for blocks of 256 inputs */
  static const int widths[] = {64, 17, 9, 5, 2, 0};
  static float alone[TEXT * VOCABULARY], found[TEXT * VOCABULARY];
  int problems = 0;
  fprintf(stderr, "%s\n", kind());
  for (int format = FLOAT32; format <= Q6_K; format++) {
    uint64_t hash = 0xcbf29ce484222325u;
    bool is_plain = format <= INT8 || format == Q4_0;
    for (int i = 0; i < (is_plain ? 3 : 1); i++) {
      counter = (uint64_t)(100 * format + i);
      Layer layers[NUM_LAYERS];
      Model m = model_of(format, is_plain ? shapes[i] : whole, layers);
      Pool *one = open_pool(1);
      decode(one, &m, 1, alone);
      problems += check_errors(one, &m);
      close_pool(one);
      for (int w = 0; w < 6; w++) {
        Pool *pool = open_pool(1 + w % MOST_THREADS);
        memset(found, 0, sizeof found);
        decode(pool, &m, widths[w], found);
        close_pool(pool);
        problems += memcmp(alone, found, sizeof found) != 0;
      }
      for (size_t j = 0; j < sizeof alone; j++) hash = (hash ^ ((uint8_t *)alone)[j]) * 0x100000001b3u;
      for (int j = 0; j < TEXT * VOCABULARY; j++) problems += !isfinite(alone[j]);
      while (num_made) free(made[--num_made]);
    }
    printf("%s %016llx\n", names[format], (unsigned long long)hash);
  }
  if (problems) fprintf(stderr, "%d problems\n", problems);
  return problems != 0;
}
