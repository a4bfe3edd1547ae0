/* Which table of kernels serves: the best that processor and operating system support. */
#include "loopos.h"

#include <string.h>

#define MOST 4

#if defined(LOOPOS_X86)
extern const loopos_table loopos_table_v2;
#if defined(LOOPOS_HAVE_V3)
extern const loopos_table loopos_table_v3;
#endif
#if defined(LOOPOS_HAVE_V4)
extern const loopos_table loopos_table_v4;
#endif
#else
extern const loopos_table loopos_table_generic;
#endif

static const loopos_table *in_use;

int loopos_levels(const loopos_table **levels, int capacity) {
    const loopos_table *found[MOST];
    int count = 0;
#if defined(LOOPOS_X86)
    /* The compiler's run-time support asks the operating system too (XGETBV). */
    __builtin_cpu_init();
#if defined(LOOPOS_HAVE_V4)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
        found[count++] = &loopos_table_v4;
#endif
#if defined(LOOPOS_HAVE_V3)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
        __builtin_cpu_supports("bmi2"))
        found[count++] = &loopos_table_v3;
#endif
    found[count++] = &loopos_table_v2;
#else
    found[count++] = &loopos_table_generic;
#endif
    for (int i = 0; i < count && i < capacity; i++) levels[i] = found[i];
    return count;
}

const loopos_table *loopos_kernels(void) {
    const loopos_table *best;
    const loopos_table *chosen = __atomic_load_n(&in_use, __ATOMIC_ACQUIRE);
    if (chosen) return chosen;
    loopos_levels(&best, 1);
    __atomic_store_n(&in_use, best, __ATOMIC_RELEASE);
    return best;
}

int loopos_use_level(const char *name) {
    const loopos_table *levels[MOST];
    int count = loopos_levels(levels, MOST);
    for (int i = 0; i < count; i++)
        if (strcmp(levels[i]->name, name) == 0) {
            __atomic_store_n(&in_use, levels[i], __ATOMIC_RELEASE);
            return 0;
        }
    return -1;
}
