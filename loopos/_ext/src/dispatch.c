/* Which table of kernels serves: the best that processor and operating system support. */
#include "loopos.h"

#include <string.h>
#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if !defined(LOOPOS_HAVE_V4) /* whose kernels serve for all but products */
#undef LOOPOS_HAVE_AMX
#endif
#if defined(LOOPOS_HAVE_AMX)
#include <pthread.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

#define MOST 5

#if defined(__x86_64__)
extern const loopos_table loopos_table_v2;
#if defined(LOOPOS_HAVE_V3)
extern const loopos_table loopos_table_v3;
#endif
#if defined(LOOPOS_HAVE_V4)
extern const loopos_table loopos_table_v4;
#endif
#if defined(LOOPOS_HAVE_AMX)
extern const loopos_table loopos_table_amx; /* products alone */
#endif
#else
extern const loopos_table loopos_table_generic;
#endif

static const loopos_table *in_use;

#if defined(__x86_64__)
/* Bits that the compilers' run-time support has no name for, or not every compiler's: of v2 CX16
   and LAHF, of v3 MOVBE, F16C and LZCNT. What needs the operating system is asked below. */
static int has_bits(unsigned ecx_of_1, unsigned ecx_of_80000001) {
    unsigned a, b, c = 0, d, more = 0;
    if (!__get_cpuid(1, &a, &b, &c, &d) || (c & ecx_of_1) != ecx_of_1) return 0;
    __get_cpuid(0x80000001u, &a, &b, &more, &d);
    return (more & ecx_of_80000001) == ecx_of_80000001;
}

/* Each level asks for all that its flags let the compiler use. The run-time support of the compiler
   asks the operating system too (XGETBV). */
static int has_v2(void) {
    __builtin_cpu_init();
    return __builtin_cpu_supports("sse4.2") && __builtin_cpu_supports("ssse3") &&
           __builtin_cpu_supports("popcnt") && has_bits(1u << 13, 1u << 0);
}
#if defined(LOOPOS_HAVE_V3) || defined(LOOPOS_HAVE_V4)
static int has_v3(void) {
    return has_v2() && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") &&
           has_bits(1u << 22 | 1u << 29, 1u << 5);
}
#endif
#if defined(LOOPOS_LOWERED) /* for tests: made of what v3 has */
#define has_v4 has_v3
#elif defined(LOOPOS_HAVE_V4)
static int has_v4(void) {
    return has_v3() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl");
}
#endif
#if defined(LOOPOS_HAVE_AMX)
#if defined(LOOPOS_LOWERED)
#define has_amx has_v3
#else
/* Linux saves tile registers for processes that ask for it. Another system would need its own way. */
static int permitted(void) {
#if defined(__linux__) && defined(SYS_arch_prctl)
    enum { REQUEST_PERMISSION = 0x1023, TILE_DATA = 18 };
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
#else
    return 0;
#endif
}

static int has_amx(void) {
    enum { BFLOAT16 = 1 << 22, TILES = 1 << 24, INT8 = 1 << 25, VECTOR_INT8 = 1 << 11 };
    const unsigned tiles = BFLOAT16 | TILES | INT8;
    unsigned a, b, c = 0, d = 0;
    if (!has_v4() || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return 0;
    return (d & tiles) == tiles && (c & VECTOR_INT8) && permitted();
}
#endif

static loopos_table table_amx;
static int amx_serves;
static pthread_once_t amx_once = PTHREAD_ONCE_INIT;
/* The table of v4 with what AMX does better. */
static void look_for_amx(void) {
    if (!has_amx()) return;
    table_amx = loopos_table_v4;
    table_amx.name = loopos_table_amx.name;
    table_amx.product = loopos_table_amx.product;
    table_amx.products = loopos_table_amx.products;
    table_amx.packed_product = loopos_table_amx.packed_product;
    table_amx.attention = loopos_table_amx.attention;
    table_amx.attention_backward = loopos_table_amx.attention_backward;
    amx_serves = 1;
}
#endif
#endif

int loopos_levels(const loopos_table **levels, int capacity) {
    const loopos_table *found[MOST];
    int count = 0;
#if defined(__x86_64__)
#if defined(LOOPOS_HAVE_AMX)
    pthread_once(&amx_once, look_for_amx);
    if (amx_serves) found[count++] = &table_amx;
#endif
#if defined(LOOPOS_HAVE_V4)
    if (has_v4()) found[count++] = &loopos_table_v4;
#endif
#if defined(LOOPOS_HAVE_V3)
    if (has_v3()) found[count++] = &loopos_table_v3;
#endif
    if (has_v2()) found[count++] = &loopos_table_v2;
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
    if (!loopos_levels(&best, 1)) return NULL;
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
