/* Level v4 for processors without AVX-512: its sizes and its vectors, which the compiler splits, in
   instructions of v3. `LOOPOS_LOWERED=1` includes this before the kernels; only tests build that. */
#include <immintrin.h>

#define __AVX512F__ 1

#define _mm512_max_ps lowered_max
#define _mm512_set1_ps(x) ((__m512)((x) - (__v16sf){0}))
#define _mm512_cmp_ps_mask(a, b, comparison) ((__v16sf)(a) < (__v16sf)(b)) /* _CMP_NLT_UQ alone */
#define _mm512_maskz_mov_ps(below, x) ((__m512)(~(below) & (__v16si)(x)))
#define __mmask16 __v16si
#define _mm512_cvtepu16_epi32(x) ((__m512i) __builtin_convertvector((__v16hu)(x), __v16su))
#define _mm512_cvtepi8_epi32(x) ((__m512i) __builtin_convertvector((__v16qs)(x), __v16si))
#define _mm512_movepi32_mask lowered_sign_bits

#define LOWERED static inline __attribute__((always_inline))
LOWERED __m512 lowered_max(__m512 a, __m512 b) {
    __v16si larger = (__v16sf)a > (__v16sf)b;
    return (__m512)((larger & (__v16si)a) | (~larger & (__v16si)b));
}
LOWERED unsigned lowered_sign_bits(__m512i lanes) {
    unsigned bits = 0;
    for (int i = 0; i < 16; i++) bits |= (unsigned)(((__v16si)lanes)[i] < 0) << i;
    return bits;
}
