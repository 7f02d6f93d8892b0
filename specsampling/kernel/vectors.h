/* Sixteen numbers at once, in the same arithmetic on every processor.

   V holds 16 floats, Z 16 whole numbers of 32 bits, W 64 bytes. Each operation below is rounded
   once, as IEEE 754 says, so all four versions give the same bits: AVX-512 with VNNI, AVX2, NEON,
   and plain C. A linear layer's weights lie as 16 outputs x 4 inputs in a W, so that one load
   serves every row of a call.

   dot_signed adds w . x for signed bytes w, four products in each of 16 outputs. VNNI multiplies
   unsigned by signed bytes. There wsigned makes w + 128, and dot_start begins with minus 128 times
   the sum of x. dot_small takes bytes w below 64, which need no such shift. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && \
    defined(__AVX512VNNI__) && !defined(PLAIN_C)
#define KIND "AVX-512"
#include <immintrin.h>
enum { TILE = 8, QUERIES = 6, DIMS = 4 }; /* rows, queries and vectors of values at once */
typedef __m512 V;
typedef __m512i Z, W;

INLINE V vload(const float *p) { return _mm512_loadu_ps(p); }
INLINE void vstore(float *p, V a) { _mm512_storeu_ps(p, a); }
INLINE V vset(float a) { return _mm512_set1_ps(a); }
INLINE V vadd(V a, V b) { return _mm512_add_ps(a, b); }
INLINE V vsub(V a, V b) { return _mm512_sub_ps(a, b); }
INLINE V vmul(V a, V b) { return _mm512_mul_ps(a, b); }
INLINE V vdiv(V a, V b) { return _mm512_div_ps(a, b); }
INLINE V vfma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
INLINE V vmax(V a, V b) { return _mm512_max_ps(a, b); }
INLINE V vmin(V a, V b) { return _mm512_min_ps(a, b); }
INLINE V vabs(V a) { return _mm512_abs_ps(a); }
INLINE V vround(V a) { return _mm512_roundscale_ps(a, 0); }
INLINE V vpower_of_2(V n) {
  Z e = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
  return _mm512_castsi512_ps(_mm512_slli_epi32(e, 23));
}
INLINE V vhalf(const uint16_t *p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
}
INLINE void vput_halves(uint16_t *p, V a) {
  _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
}
INLINE void vpairs(const uint8_t *p, V *even, V *odd) {
  Z w = _mm512_loadu_si512(p);
  *even = _mm512_castsi512_ps(_mm512_slli_epi32(w, 16));
  *odd = _mm512_castsi512_ps(_mm512_and_si512(w, _mm512_set1_epi32((int)0xffff0000)));
}
INLINE V vbytes(const uint8_t *p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p)));
}
INLINE V vsigned_bytes(const int8_t *p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
}
INLINE int32_t vput_bytes(int8_t *p, V whole) {
  Z z = _mm512_cvtps_epi32(whole);
  _mm_storeu_si128((__m128i *)p, _mm512_cvtepi32_epi8(z));
  return _mm512_reduce_add_epi32(z);
}
INLINE V vfrom(Z a) { return _mm512_cvtepi32_ps(a); }
INLINE Z zset(int32_t a) { return _mm512_set1_epi32(a); }
INLINE Z zscaled(const int32_t *p, int power) { return _mm512_slli_epi32(zset(*p), power); } /* 2^power * p */
INLINE Z zsub(Z a, Z b) { return _mm512_sub_epi32(a, b); }
INLINE Z zload(const int32_t *p) { return _mm512_loadu_si512(p); }
INLINE W wload(const uint8_t *p) {
  _mm_prefetch((const char *)p + 2048, _MM_HINT_T0);
  return _mm512_loadu_si512(p);
}
INLINE W wlow(W a) { return _mm512_and_si512(a, _mm512_set1_epi8(15)); }
INLINE W whigh(W a) { return _mm512_and_si512(_mm512_srli_epi16(a, 4), _mm512_set1_epi8(15)); }
INLINE W wsigned(W a) { return _mm512_xor_si512(a, _mm512_set1_epi8((char)0x80)); }
INLINE Z dot_start(const int32_t *minus) { return zscaled(minus, 7); }
INLINE Z dot_small(Z acc, W w, int32_t x) { return _mm512_dpbusd_epi32(acc, w, zset(x)); }
INLINE Z dot_signed(Z acc, W w, int32_t x) { return dot_small(acc, w, x); }

#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__) && !defined(PLAIN_C)
#ifdef __AVXVNNI__
#define KIND "AVX2 with VNNI"
#else
#define KIND "AVX2"
#endif
#include <immintrin.h>
enum { TILE = 2, QUERIES = 2, DIMS = 2 };
typedef struct { __m256 a, b; } V;
typedef struct { __m256i a, b; } Z, W;

#define BOTH(T, f, ...) ((T){f(a.a, ##__VA_ARGS__), f(a.b, ##__VA_ARGS__)})
#define BOTH2(T, f) ((T){f(a.a, b.a), f(a.b, b.b)})
INLINE V vload(const float *p) { return (V){_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
INLINE void vstore(float *p, V a) { _mm256_storeu_ps(p, a.a), _mm256_storeu_ps(p + 8, a.b); }
INLINE V vset(float a) { return (V){_mm256_set1_ps(a), _mm256_set1_ps(a)}; }
INLINE V vadd(V a, V b) { return BOTH2(V, _mm256_add_ps); }
INLINE V vsub(V a, V b) { return BOTH2(V, _mm256_sub_ps); }
INLINE V vmul(V a, V b) { return BOTH2(V, _mm256_mul_ps); }
INLINE V vdiv(V a, V b) { return BOTH2(V, _mm256_div_ps); }
INLINE V vfma(V a, V b, V c) {
  return (V){_mm256_fmadd_ps(a.a, b.a, c.a), _mm256_fmadd_ps(a.b, b.b, c.b)};
}
INLINE V vmax(V a, V b) { return BOTH2(V, _mm256_max_ps); }
INLINE V vmin(V a, V b) { return BOTH2(V, _mm256_min_ps); }
INLINE V vabs(V a) {
  __m256 sign = _mm256_set1_ps(-0.0f);
  return (V){_mm256_andnot_ps(sign, a.a), _mm256_andnot_ps(sign, a.b)};
}
INLINE V vround(V a) { return BOTH(V, _mm256_round_ps, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INLINE __m256 power_of_2(__m256 n) {
  __m256i e = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return _mm256_castsi256_ps(_mm256_slli_epi32(e, 23));
}
INLINE V vpower_of_2(V a) { return BOTH(V, power_of_2); }
INLINE V vhalf(const uint16_t *p) {
  return (V){_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)),
             _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p + 8)))};
}
INLINE void vput_halves(uint16_t *p, V a) {
  _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph(a.a, _MM_FROUND_TO_NEAREST_INT));
  _mm_storeu_si128((__m128i *)(p + 8), _mm256_cvtps_ph(a.b, _MM_FROUND_TO_NEAREST_INT));
}
INLINE W wload(const uint8_t *p) {
  _mm_prefetch((const char *)p + 2048, _MM_HINT_T0);
  return (W){_mm256_loadu_si256((const __m256i *)p), _mm256_loadu_si256((const __m256i *)(p + 32))};
}
INLINE void vpairs(const uint8_t *p, V *even, V *odd) {
  W w = wload(p);
  __m256i mask = _mm256_set1_epi32((int)0xffff0000);
  *even = (V){_mm256_castsi256_ps(_mm256_slli_epi32(w.a, 16)),
              _mm256_castsi256_ps(_mm256_slli_epi32(w.b, 16))};
  *odd = (V){_mm256_castsi256_ps(_mm256_and_si256(w.a, mask)),
             _mm256_castsi256_ps(_mm256_and_si256(w.b, mask))};
}
INLINE V vbytes(const uint8_t *p) {
  return (V){_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p))),
             _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(p + 8))))};
}
INLINE V vsigned_bytes(const int8_t *p) {
  return (V){_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p))),
             _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(p + 8))))};
}
INLINE int32_t vput_bytes(int8_t *p, V whole) {
  int32_t numbers[16], sum = 0;
  _mm256_storeu_si256((__m256i *)numbers, _mm256_cvtps_epi32(whole.a));
  _mm256_storeu_si256((__m256i *)(numbers + 8), _mm256_cvtps_epi32(whole.b));
  for (int i = 0; i < 16; i++) sum += p[i] = (int8_t)numbers[i];
  return sum;
}
INLINE V vfrom(Z a) { return BOTH(V, _mm256_cvtepi32_ps); }
INLINE Z zset(int32_t a) { return (Z){_mm256_set1_epi32(a), _mm256_set1_epi32(a)}; }
INLINE Z zscaled(const int32_t *p, int power) { return zset(*p * (1 << power)); }
INLINE Z zsub(Z a, Z b) { return BOTH2(Z, _mm256_sub_epi32); }
INLINE W wlow(W a) {
  __m256i m = _mm256_set1_epi8(15);
  return (W){_mm256_and_si256(a.a, m), _mm256_and_si256(a.b, m)};
}
INLINE W whigh(W a) {
  return wlow((W){_mm256_srli_epi16(a.a, 4), _mm256_srli_epi16(a.b, 4)});
}
#ifdef __AVXVNNI__
INLINE W wsigned(W a) {
  __m256i m = _mm256_set1_epi8((char)0x80);
  return (W){_mm256_xor_si256(a.a, m), _mm256_xor_si256(a.b, m)};
}
INLINE Z dot_start(const int32_t *minus) { return zscaled(minus, 7); }
INLINE Z dot_small(Z acc, W w, int32_t x) {
  __m256i v = _mm256_set1_epi32(x);
  return (Z){_mm256_dpbusd_avx_epi32(acc.a, w.a, v), _mm256_dpbusd_avx_epi32(acc.b, w.b, v)};
}
INLINE Z dot_signed(Z acc, W w, int32_t x) { return dot_small(acc, w, x); }
#else
/* The sum of two products must fit into 16 bits, so unsigned bytes may not be large. Instead of a
   shift, the sign of a weight is moved to its input. */
INLINE __m256i pairs_of(__m256i acc, __m256i w, __m256i x) {
  __m256i pairs = _mm256_maddubs_epi16(w, x);
  return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
INLINE W wsigned(W a) { return a; }
INLINE Z dot_start(const int32_t *minus) { return (void)minus, zset(0); }
INLINE Z dot_small(Z acc, W w, int32_t x) {
  __m256i v = _mm256_set1_epi32(x);
  return (Z){pairs_of(acc.a, w.a, v), pairs_of(acc.b, w.b, v)};
}
INLINE Z dot_signed(Z acc, W w, int32_t x) {
  __m256i v = _mm256_set1_epi32(x);
  return (Z){pairs_of(acc.a, _mm256_abs_epi8(w.a), _mm256_sign_epi8(v, w.a)),
             pairs_of(acc.b, _mm256_abs_epi8(w.b), _mm256_sign_epi8(v, w.b))};
}
#endif

#elif defined(__ARM_NEON) && defined(__ARM_FEATURE_DOTPROD) && !defined(PLAIN_C)
#define KIND "NEON"
#include <arm_neon.h>
enum { TILE = 2, QUERIES = 2, DIMS = 2 };
typedef struct { float32x4_t v[4]; } V;
typedef struct { int32x4_t v[4]; } Z;
typedef struct { uint8x16_t v[4]; } W;

#define EACH(T, expression) T y; for (int i = 0; i < 4; i++) y.v[i] = expression; return y
INLINE V vload(const float *p) { EACH(V, vld1q_f32(p + 4 * i)); }
INLINE void vstore(float *p, V a) { for (int i = 0; i < 4; i++) vst1q_f32(p + 4 * i, a.v[i]); }
INLINE V vset(float a) { EACH(V, vdupq_n_f32(a)); }
INLINE V vadd(V a, V b) { EACH(V, vaddq_f32(a.v[i], b.v[i])); }
INLINE V vsub(V a, V b) { EACH(V, vsubq_f32(a.v[i], b.v[i])); }
INLINE V vmul(V a, V b) { EACH(V, vmulq_f32(a.v[i], b.v[i])); }
INLINE V vdiv(V a, V b) { EACH(V, vdivq_f32(a.v[i], b.v[i])); }
INLINE V vfma(V a, V b, V c) { EACH(V, vfmaq_f32(c.v[i], a.v[i], b.v[i])); }
INLINE V vmax(V a, V b) { EACH(V, vmaxq_f32(a.v[i], b.v[i])); }
INLINE V vmin(V a, V b) { EACH(V, vminq_f32(a.v[i], b.v[i])); }
INLINE V vabs(V a) { EACH(V, vabsq_f32(a.v[i])); }
INLINE V vround(V a) { EACH(V, vrndnq_f32(a.v[i])); }
INLINE V vpower_of_2(V n) {
  EACH(V, vreinterpretq_f32_s32(
              vshlq_n_s32(vaddq_s32(vcvtnq_s32_f32(n.v[i]), vdupq_n_s32(127)), 23)));
}
INLINE V vhalf(const uint16_t *p) {
  EACH(V, vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p + 4 * i))));
}
INLINE void vput_halves(uint16_t *p, V a) {
  for (int i = 0; i < 4; i++) vst1_u16(p + 4 * i, vreinterpret_u16_f16(vcvt_f16_f32(a.v[i])));
}
INLINE void vpairs(const uint8_t *p, V *even, V *odd) {
  for (int i = 0; i < 4; i++) {
    uint32x4_t w = vreinterpretq_u32_u8(vld1q_u8(p + 16 * i));
    even->v[i] = vreinterpretq_f32_u32(vshlq_n_u32(w, 16));
    odd->v[i] = vreinterpretq_f32_u32(vandq_u32(w, vdupq_n_u32(0xffff0000u)));
  }
}
INLINE V vfrom(Z a) { EACH(V, vcvtq_f32_s32(a.v[i])); }
INLINE V vbytes(const uint8_t *p) {
  int32_t numbers[16];
  for (int i = 0; i < 16; i++) numbers[i] = p[i];
  EACH(V, vcvtq_f32_s32(vld1q_s32(numbers + 4 * i)));
}
INLINE V vsigned_bytes(const int8_t *p) {
  int32_t numbers[16];
  for (int i = 0; i < 16; i++) numbers[i] = p[i];
  EACH(V, vcvtq_f32_s32(vld1q_s32(numbers + 4 * i)));
}
INLINE int32_t vput_bytes(int8_t *p, V whole) {
  int32_t numbers[16], sum = 0;
  for (int i = 0; i < 4; i++) vst1q_s32(numbers + 4 * i, vcvtnq_s32_f32(whole.v[i]));
  for (int i = 0; i < 16; i++) sum += p[i] = (int8_t)numbers[i];
  return sum;
}
INLINE Z zset(int32_t a) { EACH(Z, vdupq_n_s32(a)); }
INLINE Z zscaled(const int32_t *p, int power) { return zset(*p * (1 << power)); }
INLINE Z zsub(Z a, Z b) { EACH(Z, vsubq_s32(a.v[i], b.v[i])); }
INLINE W wload(const uint8_t *p) { EACH(W, vld1q_u8(p + 16 * i)); }
INLINE W wlow(W a) { EACH(W, vandq_u8(a.v[i], vdupq_n_u8(15))); }
INLINE W whigh(W a) { EACH(W, vshrq_n_u8(a.v[i], 4)); }
INLINE W wsigned(W a) { return a; }
INLINE Z dot_start(const int32_t *minus) { return (void)minus, zset(0); }
INLINE Z dot_signed(Z acc, W w, int32_t x) {
  int8x16_t v = vreinterpretq_s8_s32(vdupq_n_s32(x));
  EACH(Z, vdotq_s32(acc.v[i], vreinterpretq_s8_u8(w.v[i]), v));
}
INLINE Z dot_small(Z acc, W w, int32_t x) { return dot_signed(acc, w, x); }

#else
#define KIND "plain C"
enum { TILE = 2, QUERIES = 2, DIMS = 2 };
typedef struct { float v[16]; } V;
typedef struct { int32_t v[16]; } Z;
typedef struct { uint8_t v[64]; } W;

#define EACH(T, expression) T y; for (int i = 0; i < 16; i++) y.v[i] = expression; return y
INLINE V vload(const float *p) { EACH(V, p[i]); }
INLINE void vstore(float *p, V a) { memcpy(p, a.v, sizeof a.v); }
INLINE V vset(float a) { EACH(V, a); }
INLINE V vadd(V a, V b) { EACH(V, a.v[i] + b.v[i]); }
INLINE V vsub(V a, V b) { EACH(V, a.v[i] - b.v[i]); }
INLINE V vmul(V a, V b) { EACH(V, a.v[i] * b.v[i]); }
INLINE V vdiv(V a, V b) { EACH(V, a.v[i] / b.v[i]); }
INLINE V vfma(V a, V b, V c) { EACH(V, fmaf(a.v[i], b.v[i], c.v[i])); }
INLINE V vmax(V a, V b) { EACH(V, a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
INLINE V vmin(V a, V b) { EACH(V, a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }
INLINE V vabs(V a) { EACH(V, fabsf(a.v[i])); }
INLINE V vround(V a) { EACH(V, nearbyintf(a.v[i])); }
INLINE float from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
INLINE float half_of(uint16_t bits) { /* any float16: also subnormal, infinite or nan */
  uint32_t sign = (uint32_t)(bits & 0x8000) << 16, exponent = bits >> 10 & 31, rest = bits & 1023;
  if (exponent == 0) return from_bits(sign | 0x3f800000) * ((float)rest * 0x1p-24f);
  return from_bits(sign | (exponent == 31 ? 255 : exponent + 112) << 23 | rest << 13);
}
INLINE V vpower_of_2(V n) { EACH(V, from_bits((uint32_t)((int32_t)n.v[i] + 127) << 23)); }
INLINE V vhalf(const uint16_t *p) { EACH(V, half_of(p[i])); }
INLINE uint16_t half_bits(float value) { /* rounds to the nearest float16, ties to even */
  uint32_t bits;
  memcpy(&bits, &value, 4);
  uint32_t sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
  if (size >= 0x47800000) return (uint16_t)(sign | (size > 0x7f800000 ? 0x7e00 : 0x7c00));
  if (size < 0x38800000) return (uint16_t)(sign | (uint32_t)nearbyintf(fabsf(value) * 0x1p24f));
  size += 0xfff + (size >> 13 & 1);
  return (uint16_t)(sign | (size - 0x38000000) >> 13);
}
INLINE void vput_halves(uint16_t *p, V a) { for (int i = 0; i < 16; i++) p[i] = half_bits(a.v[i]); }
INLINE void vpairs(const uint8_t *p, V *even, V *odd) {
  for (int i = 0; i < 16; i++) {
    uint32_t w;
    memcpy(&w, p + 4 * i, 4);
    even->v[i] = from_bits(w << 16), odd->v[i] = from_bits(w & 0xffff0000u);
  }
}
INLINE V vfrom(Z a) { EACH(V, (float)a.v[i]); }
INLINE V vbytes(const uint8_t *p) { EACH(V, (float)p[i]); }
INLINE V vsigned_bytes(const int8_t *p) { EACH(V, (float)p[i]); }
INLINE int32_t vput_bytes(int8_t *p, V whole) {
  int32_t sum = 0;
  for (int i = 0; i < 16; i++) sum += p[i] = (int8_t)(int32_t)whole.v[i];
  return sum;
}
INLINE Z zset(int32_t a) { EACH(Z, a); }
INLINE Z zscaled(const int32_t *p, int power) { return zset(*p * (1 << power)); }
INLINE Z zsub(Z a, Z b) { EACH(Z, a.v[i] - b.v[i]); }
INLINE W wload(const uint8_t *p) { W y; memcpy(y.v, p, 64); return y; }
INLINE W wlow(W a) { W y; for (int i = 0; i < 64; i++) y.v[i] = a.v[i] & 15; return y; }
INLINE W whigh(W a) { W y; for (int i = 0; i < 64; i++) y.v[i] = a.v[i] >> 4; return y; }
INLINE W wsigned(W a) { return a; }
INLINE Z dot_start(const int32_t *minus) { return (void)minus, zset(0); }
INLINE Z dot_signed(Z acc, W w, int32_t x) {
  int8_t in[4];
  memcpy(in, &x, 4);
  for (int i = 0; i < 64; i++) acc.v[i / 4] += (int8_t)w.v[i] * in[i % 4];
  return acc;
}
INLINE Z dot_small(Z acc, W w, int32_t x) { return dot_signed(acc, w, x); }
#endif

/* Returns the sum of 16 floats, in the same order everywhere. */
INLINE float vsum(V a) {
  float v[16];
  vstore(v, a);
  for (int half = 8; half; half /= 2)
    for (int i = 0; i < half; i++) v[i] += v[i + half];
  return v[0];
}

/* Returns the largest of 16 floats. */
INLINE float vlargest(V a) {
  float v[16];
  vstore(v, a);
  for (int i = 1; i < 16; i++) v[0] = v[i] > v[0] ? v[i] : v[0];
  return v[0];
}

/* Returns the bits of a float rounded to bfloat16, ties to even. A nan stays one. */
INLINE uint16_t bfloat16_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fc0;
  return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

/* Rounds 16 floats to bfloat16, and stores their bits. */
INLINE V vbfloat16(V a, uint16_t *bits) {
  float v[16];
  uint32_t wide[16];
  vstore(v, a);
  for (int i = 0; i < 16; i++) bits[i] = bfloat16_bits(v[i]), wide[i] = (uint32_t)bits[i] << 16;
  memcpy(v, wide, sizeof v);
  return vload(v);
}

/* Returns the largest magnitude of 32 floats. It is nan if one is: nan has the largest bits. */
INLINE float vmagnitude(V a, V b) {
  float v[32];
  uint32_t bits[32], largest = 0;
  vstore(v, a), vstore(v + 16, b), memcpy(bits, v, sizeof v);
  for (int i = 0; i < 32; i++) {
    uint32_t size = bits[i] & 0x7fffffff;
    largest = size > largest ? size : largest;
  }
  float value;
  memcpy(&value, &largest, 4);
  return value;
}

/* Returns e^x to a few units in the last place. x is clamped to where the result is a normal number.
   Then x = n ln 2 + r, and a polynomial gives e^r (Cephes). */
INLINE V vexp(V x) {
  x = vmin(vset(88.0f), vmax(vset(-87.0f), x)); /* in this order, nan stays nan */
  V n = vround(vmul(x, vset(1.44269504f)));
  V r = vfma(n, vset(-0.693359375f), x);
  r = vfma(n, vset(2.12194440e-4f), r);
  V p = vset(1.9875691500e-4f);
  p = vfma(p, r, vset(1.3981999507e-3f));
  p = vfma(p, r, vset(8.3334519073e-3f));
  p = vfma(p, r, vset(4.1665795894e-2f));
  p = vfma(p, r, vset(1.6666665459e-1f));
  p = vfma(p, r, vset(5.0000001201e-1f));
  p = vfma(p, vmul(r, r), vadd(r, vset(1.0f)));
  return vmul(p, vpower_of_2(n));
}

/* Returns x / (1 + e^-exponent). It is SiLU for x, and gelu_new for GELU's polynomial. */
INLINE V vgated(V x, V exponent) {
  return vdiv(x, vadd(vset(1.0f), vexp(vsub(vset(0.0f), exponent))));
}
