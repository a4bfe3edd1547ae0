/* Levels v4 and amx for processors without AVX-512 or AMX: their sizes, vectors, which the compiler
   splits, and tile registers, in instructions of v3. `LOOPOS_LOWERED=1` includes this before the kernels;
   only tests build that. */
#include <immintrin.h>
#include <string.h>

#define __AVX512F__ 1

#define _mm512_max_ps lowered_max
#define _mm512_set1_ps(x) ((__m512)((x) - (__v16sf){0}))
#define _mm512_cmp_ps_mask(a, b, comparison) ((__v16sf)(a) < (__v16sf)(b)) /* _CMP_NLT_UQ alone */
#define _mm512_maskz_mov_ps(below, x) ((__m512)(~(below) & (__v16si)(x)))
#define __mmask16 __v16si
#define _mm512_cvtps_epi32 lowered_nearest
#define _mm512_cvtepi32_epi8(x) ((__m128i) __builtin_convertvector((__v16si)(x), __v16qi))
#define _mm512_set1_epi8(x) ((__m512i)((__v64qi){0} + (char)(x)))
#define _mm512_setzero_si512() ((__m512i){0})
#define _mm512_loadu_si512 lowered_load_lanes
#define _mm512_xor_si512(a, b) ((a) ^ (b))
#define _mm512_dpbusd_epi32 lowered_add_products
#define _mm512_reduce_add_epi32 lowered_sum
#define _mm512_movepi32_mask lowered_sign_bits
#define _mm512_castpd256_pd512 lowered_half
#define _mm512_insertf64x4(both, high, place) lowered_halves(both, high)

#define LOWERED static inline __attribute__((always_inline))
LOWERED __m512 lowered_max(__m512 a, __m512 b) {
    __v16si larger = (__v16sf)a > (__v16sf)b;
    return (__m512)((larger & (__v16si)a) | (~larger & (__v16si)b));
}
LOWERED __m512d lowered_half(__m256d low) {
    __m512d both = {0};
    memcpy(&both, &low, sizeof low);
    return both;
}
LOWERED __m512d lowered_halves(__m512d both, __m256d high) {
    memcpy((char *)&both + sizeof high, &high, sizeof high);
    return both;
}
LOWERED unsigned lowered_sign_bits(__m512i lanes) {
    unsigned bits = 0;
    for (int i = 0; i < 16; i++) bits |= (unsigned)(((__v16si)lanes)[i] < 0) << i;
    return bits;
}

LOWERED __m512i lowered_nearest(__m512 x) {
    __v16si whole;
    for (int i = 0; i < 16; i++) whole[i] = _mm_cvtss_si32(_mm_set_ss(((__v16sf)x)[i]));
    return (__m512i)whole;
}
LOWERED __m512i lowered_load_lanes(const void *from) {
    __m512i lanes;
    memcpy(&lanes, from, sizeof lanes);
    return lanes;
}
/* Four products of a byte without and a byte with a sign for each lane. */
LOWERED __m512i lowered_add_products(__m512i sums, __m512i a, __m512i b) {
    __v16su total = (__v16su)sums;
    for (int i = 0; i < 64; i++)
        total[i / 4] += (unsigned)(((__v64qu)a)[i] * (signed char)((__v64qi)b)[i]);
    return (__m512i)total;
}
LOWERED int lowered_sum(__m512i lanes) {
    int total = 0;
    for (int i = 0; i < 16; i++) total += ((__v16si)lanes)[i];
    return total;
}

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#undef _tile_dpbssd
#define _tile_loadconfig(sizes) ((void)(sizes))
#define _tile_release() ((void)0)
#define _tile_zero(tile) memset(lowered_tiles[tile], 0, sizeof lowered_tiles[tile])
#define _tile_loadd(tile, from, stride) lowered_load(tile, from, stride)
#define _tile_stored(tile, to, stride) lowered_store(tile, to, stride)
#define _tile_dpbf16ps(sums, a, b) lowered_multiply(sums, a, b)
#define _tile_dpbssd(sums, a, b) lowered_multiply_bytes(sums, a, b)

static _Thread_local __v16sf lowered_tiles[8][16];
__attribute__((unused)) static void lowered_load(int tile, const void *from, long stride) {
    for (int row = 0; row < 16; row++)
        memcpy(&lowered_tiles[tile][row], (const char *)from + row * stride, 64);
}
__attribute__((unused)) static void lowered_store(int tile, void *to, long stride) {
    for (int row = 0; row < 16; row++)
        memcpy((char *)to + row * stride, &lowered_tiles[tile][row], 64);
}
/* Subnormal numbers are zeros to the unit. */
LOWERED __v16sf lowered_flush(__v16sf x) {
    __v16su size = (__v16su)x & 0x7fffffffu;
    return (__v16sf)((__v16su)x & (~(__v16su)(size < 0x00800000u) | 0x80000000u));
}
__attribute__((unused)) static void lowered_multiply(int sums, int a, int b) {
    for (int row = 0; row < 16; row++) {
        __v16sf first = {0}, second = {0};
        for (int pair = 0; pair < 16; pair++) {
            unsigned left = ((__v16su)lowered_tiles[a][row])[pair];
            __v16su right = (__v16su)lowered_tiles[b][pair], both = left - (__v16su){0};
            first += lowered_flush((__v16sf)(both << 16)) * lowered_flush((__v16sf)(right << 16));
            second += lowered_flush((__v16sf)(both & 0xffff0000u)) *
                      lowered_flush((__v16sf)(right & 0xffff0000u));
            first = lowered_flush(first), second = lowered_flush(second);
        }
        lowered_tiles[sums][row] = lowered_flush(lowered_tiles[sums][row] + lowered_flush(first + second));
    }
}
__attribute__((unused)) static void lowered_multiply_bytes(int sums, int a, int b) {
    for (int row = 0; row < 16; row++) {
        const __v64qi left = (__v64qi)lowered_tiles[a][row];
        __v16si total = (__v16si)lowered_tiles[sums][row];
        for (int i = 0; i < 16; i++) {
            const __v64qi right = (__v64qi)lowered_tiles[b][i];
            for (int at = 0; at < 64; at++)
                total[at / 4] += (signed char)left[4 * i + at % 4] * (signed char)right[at];
        }
        lowered_tiles[sums][row] = (__v16sf)total;
    }
}
