/* Memory that is reused: a block given back waits for the next that asks for its size, so that a
   training step finds the pages of the step before. */
#include "loopos.h"

#include <pthread.h>
#include <stdlib.h>
#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif
#if defined(__GLIBC__)
#include <malloc.h>
#endif

/* The address sanitizer is told what of a block is nobody's. */
#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define __SANITIZE_ADDRESS__ 1
#endif
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(memory, bytes) ((void)(memory), (void)(bytes))
#define ASAN_UNPOISON_MEMORY_REGION(memory, bytes) ((void)(memory), (void)(bytes))
#endif

/* Sizes are rounded up to eighths of powers of two, at most 12.5 % more than was asked for. */
#define STEPS 8
#define SMALLEST 256
#define CLASSES (40 * STEPS)
#define HUGE_PAGE ((size_t)2 << 20)
/* Blocks from this size to that of a huge page lie side by side in slabs, so that they have huge pages
   too. Not under the sanitizer: it watches what lies between blocks. */
#define SLAB_LEAST ((size_t)64 << 10)
#define SLAB_BYTES ((size_t)16 << 20)
#if defined(__linux__) && defined(MADV_HUGEPAGE) && !defined(__SANITIZE_ADDRESS__)
#define IN_SLABS(size) ((size) >= SLAB_LEAST && (size) < HUGE_PAGE)
#else
#define IN_SLABS(size) 0
#endif
/* What may be kept beyond the most that was in use at once, as a share of that and in bytes. */
#define SLACK_SHARE 8
#define SLACK_BYTES ((size_t)8 << 20)

typedef struct { /* the first 64 bytes of its memory */
    size_t used; /* bytes from the start that blocks have taken, dead ones too */
    long blocks; /* that are not dead */
} slab_t;

typedef struct block {
    size_t size; /* usable bytes */
    int class;
    slab_t *slab; /* NULL: has memory of its own */
    unsigned long given; /* when it was given back */
    struct block *older, *newer;
} block_t; /* lies in the 64 bytes before the memory */

static struct {
    pthread_mutex_t lock;
    block_t *newest[CLASSES], *oldest[CLASSES];
    slab_t *slab; /* where the next small block will lie */
    size_t used, kept, peak;
    unsigned long clock;
} arena = {.lock = PTHREAD_MUTEX_INITIALIZER};

static void before_fork(void) { pthread_mutex_lock(&arena.lock); }
static void after_fork(void) { pthread_mutex_unlock(&arena.lock); }
static void initialise(void) { pthread_atfork(before_fork, after_fork, after_fork); }
static pthread_once_t once = PTHREAD_ONCE_INIT;

/* Round up to a class; -1 when no class is so large. */
static int class_of(size_t *bytes) {
    size_t base = SMALLEST;
    int class = 0;
    while (base < *bytes) {
        for (int step = 0; step < STEPS; step++, class++) {
            size_t size = base + base / STEPS * (size_t)step;
            if (*bytes <= size) {
                *bytes = size;
                return class;
            }
        }
        base *= 2;
        if (class >= CLASSES) return -1;
    }
    *bytes = base;
    return class < CLASSES ? class : -1;
}

static void unlink_block(block_t *block) {
    block_t **newest = &arena.newest[block->class], **oldest = &arena.oldest[block->class];
    *(block->newer ? &block->newer->older : newest) = block->older;
    *(block->older ? &block->older->newer : oldest) = block->newer;
    arena.kept -= block->size;
}

/* Hand a block to the system: of a slab its pages, and the slab when none is left in it. */
static void release(block_t *block) {
    slab_t *slab = block->slab;
    ASAN_UNPOISON_MEMORY_REGION((char *)block + 64, block->size);
    if (!slab) {
        free(block);
        return;
    }
    if (--slab->blocks == 0) {
        if (slab != arena.slab) {
            free(slab);
            return;
        }
        slab->used = 64;
    }
#if defined(__linux__)
    uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE), begin = (uintptr_t)block + 64;
    uintptr_t end = (begin + block->size) / page * page;
    begin = (begin + page - 1) / page * page;
    madvise((void *)begin, end - begin, MADV_DONTNEED);
#endif
}

/* Hand the blocks that waited longest to the system until so much is kept at most. */
static void keep_at_most(size_t bytes) {
    while (arena.kept > bytes) {
        block_t *first = NULL;
        for (int class = 0; class < CLASSES; class++) {
            block_t *block = arena.oldest[class];
            if (block && (!first || block->given < first->given)) first = block;
        }
        unlink_block(first);
        release(first);
    }
}

/* Memory that huge pages are asked for where it is large. */
static void *new_memory(size_t bytes) {
    void *memory = NULL;
    size_t alignment = bytes > HUGE_PAGE ? HUGE_PAGE : 64;
    if (posix_memalign(&memory, alignment, bytes)) return NULL;
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    if (alignment == HUGE_PAGE) madvise(memory, bytes & ~(HUGE_PAGE - 1), MADV_HUGEPAGE);
#endif
    return memory;
}

static block_t *fresh(size_t size, int class) {
    size_t total = (size + 64 + 63) / 64 * 64;
    slab_t *slab = NULL;
    block_t *block;
    if (IN_SLABS(size)) {
        slab = arena.slab;
        if (!slab || SLAB_BYTES - slab->used < total) {
            slab = new_memory(SLAB_BYTES);
            if (!slab) return NULL;
            *slab = (slab_t){64, 0};
            arena.slab = slab;
        }
        block = (block_t *)((char *)slab + slab->used);
        slab->used += total;
        slab->blocks++;
    } else {
        block = new_memory(total);
        if (!block) return NULL;
    }
    block->size = size;
    block->class = class;
    block->slab = slab;
    return block;
}

void *loopos_take(size_t bytes) {
    pthread_once(&once, initialise);
    size_t asked = bytes;
    int class = class_of(&bytes);
    if (class < 0) return NULL;
    pthread_mutex_lock(&arena.lock);
    block_t *block = arena.newest[class];
    if (block)
        unlink_block(block);
    else {
        size_t most = arena.used + bytes > arena.peak ? arena.used + bytes : arena.peak;
        size_t limit = most + most / SLACK_SHARE + SLACK_BYTES;
        size_t total = arena.used + bytes;
        keep_at_most(limit > total ? limit - total : 0);
        block = fresh(bytes, class);
        if (!block) {
            keep_at_most(0);
            block = fresh(bytes, class);
        }
    }
    if (block) {
        arena.used += block->size;
        if (arena.used > arena.peak) arena.peak = arena.used;
    }
    pthread_mutex_unlock(&arena.lock);
    if (!block) return NULL;
    char *memory = (char *)block + 64;
    ASAN_UNPOISON_MEMORY_REGION(memory, asked);
    ASAN_POISON_MEMORY_REGION(memory + asked, bytes - asked);
    return memory;
}

void loopos_give(void *memory) {
    block_t *block = (block_t *)((char *)memory - 64);
    ASAN_POISON_MEMORY_REGION(memory, block->size);
    pthread_mutex_lock(&arena.lock);
    block->given = ++arena.clock;
    block->newer = NULL;
    block->older = arena.newest[block->class];
    *(block->older ? &block->older->newer : &arena.oldest[block->class]) = block;
    arena.newest[block->class] = block;
    arena.used -= block->size;
    arena.kept += block->size;
    pthread_mutex_unlock(&arena.lock);
}

void loopos_arena_state(size_t *used, size_t *kept, size_t *peak) {
    pthread_mutex_lock(&arena.lock);
    *used = arena.used;
    *kept = arena.kept;
    *peak = arena.peak;
    pthread_mutex_unlock(&arena.lock);
}

void loopos_arena_trim(void) {
    pthread_mutex_lock(&arena.lock);
    keep_at_most(0);
    if (arena.slab && arena.slab->blocks == 0) {
        free(arena.slab);
        arena.slab = NULL;
    }
    arena.peak = arena.used;
    pthread_mutex_unlock(&arena.lock);
#if defined(__GLIBC__)
    malloc_trim(0); /* what lay on the heap is the C library's to hand on */
#endif
}
