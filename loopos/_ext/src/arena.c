/* Memory that is reused: the arena lies at one place, blocks are taken from its low end, and what
   is given back joins its neighbours. So a training step, which takes and gives back what the step
   before did, finds the same blocks at the same addresses, with their pages.

   The search is that of Masmano et al., "TLSF: a new dynamic memory allocator for real-time
   systems" (ECRTS 2004), with the smallest of the blocks found instead of the first. */
#include "loopos.h"

#include <pthread.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>
#if defined(__GLIBC__)
#include <malloc.h>
#endif

/* The address sanitizer is told what is nobody's, and between blocks is a line of that. */
#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define __SANITIZE_ADDRESS__ 1
#endif
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#define GUARD 64
#else
#define ASAN_POISON_MEMORY_REGION(memory, bytes) ((void)(memory), (void)(bytes))
#define ASAN_UNPOISON_MEMORY_REGION(memory, bytes) ((void)(memory), (void)(bytes))
#define GUARD 0
#endif
#if !defined(MAP_NORESERVE)
#define MAP_NORESERVE 0
#endif

#define LINE ((size_t)64)
#define HUGE_PAGE ((size_t)2 << 20)
/* Small blocks, many and of all ages, lie in a part of their own. */
#define SMALL ((size_t)64 << 10)
/* That part has addresses for this share of the machine's memory, the other for all of it. */
#define SMALL_SHARE 16
/* So much more becomes accessible at once. */
#define GROWTH ((size_t)32 << 20)
/* Free blocks are found by their size, in eighths of powers of two from a line on. */
#define STEPS_BITS 3
#define CLASSES (40 << STEPS_BITS)
#define WORDS (CLASSES / 64)
/* So many free blocks of a class are looked at for the smallest that does. */
#define LOOKS 32
/* What may be kept beyond the most that was in use at once, as a share of that and in bytes. */
#define SLACK_SHARE 4
#define SLACK_BYTES ((size_t)8 << 20)

typedef enum { IN_USE, FREE, FREE_WITHOUT_PAGES, ALONE } state_t;

typedef struct block {           /* the first line of a block; a guard may follow */
    size_t size;                 /* bytes, this line included */
    struct block *before;        /* the one that ends where this begins, or NULL */
    struct block *newer, *older; /* free ones of its class */
    state_t state;
} block_t;

#define HEAD (LINE + GUARD)

typedef struct {
    char *begin, *accessible, *end;   /* of the addresses */
    char *top, *high;                 /* where blocks end, and have ended since the last trim */
    block_t *last;                    /* the block that ends at the top, never a free one */
    block_t *free[CLASSES];           /* the newest */
    uint64_t some[WORDS];             /* a bit for each class that has one */
} part_t;

static struct {
    pthread_mutex_t lock;
    part_t small, large;
    size_t used, kept, peak; /* kept: free blocks that have pages, and those above the top */
} arena = {.lock = PTHREAD_MUTEX_INITIALIZER};

/* Addresses only: memory is the system's until a page of it is written to. */
static void reserve(part_t *part, size_t bytes) {
    char *found = MAP_FAILED;
    for (; bytes > HUGE_PAGE; bytes /= 2) {
        bytes = bytes / HUGE_PAGE * HUGE_PAGE;
        int flags = MAP_PRIVATE | MAP_ANON | MAP_NORESERVE;
        found = mmap(NULL, bytes + HUGE_PAGE, PROT_NONE, flags, -1, 0);
        if (found != MAP_FAILED) break;
    }
    if (found == MAP_FAILED) return; /* every block has memory of its own */
    found += -(uintptr_t)found % HUGE_PAGE;
    part->begin = part->accessible = part->top = part->high = found;
    part->end = found + bytes;
#if defined(MADV_HUGEPAGE)
    madvise(found, bytes, MADV_HUGEPAGE);
#endif
}

static void before_fork(void) { pthread_mutex_lock(&arena.lock); }
static void after_fork(void) { pthread_mutex_unlock(&arena.lock); }
static void initialise(void) {
    size_t memory = (size_t)sysconf(_SC_PHYS_PAGES) * (size_t)sysconf(_SC_PAGESIZE);
    struct rlimit limit;
    /* Where addresses are limited, most of them are left to others. */
    if (!getrlimit(RLIMIT_AS, &limit) && limit.rlim_cur != RLIM_INFINITY)
        if (limit.rlim_cur / 4 < memory) memory = (size_t)limit.rlim_cur / 4;
    reserve(&arena.small, memory / SMALL_SHARE);
    reserve(&arena.large, memory);
    pthread_atfork(before_fork, after_fork, after_fork);
}
static pthread_once_t once = PTHREAD_ONCE_INIT;

static part_t *part_of(const block_t *block) {
    const char *at = (const char *)block;
    return at >= arena.small.begin && at < arena.small.end ? &arena.small : &arena.large;
}

/* The class of the blocks of at least this size, and less than the next class's. */
static int class_of(size_t size) {
    int power = 63 - __builtin_clzll(size), step = (int)(size >> (power - STEPS_BITS)) & 7;
    int class = (power - 6) * (1 << STEPS_BITS) + step;
    return class < CLASSES ? class : CLASSES - 1;
}

static block_t *after(const part_t *part, block_t *block) {
    char *next = (char *)block + block->size;
    return next < part->top ? (block_t *)next : NULL;
}

static int is_free(const block_t *block) {
    return block && (block->state == FREE || block->state == FREE_WITHOUT_PAGES);
}

static void link_block(part_t *part, block_t *block) {
    int class = class_of(block->size);
    block->newer = NULL;
    block->older = part->free[class];
    if (block->older) block->older->newer = block;
    part->free[class] = block;
    part->some[class / 64] |= (uint64_t)1 << class % 64;
}

static void unlink_block(part_t *part, block_t *block) {
    int class = class_of(block->size);
    if (block->older) block->older->newer = block->newer;
    if (block->newer)
        block->newer->older = block->older;
    else if (!(part->free[class] = block->older))
        part->some[class / 64] &= ~((uint64_t)1 << class % 64);
}

/* The first class from this one on that has a free block, or -1. */
static int class_with_some(const part_t *part, int class) {
    for (int word = class / 64; word < WORDS; word++) {
        uint64_t some = part->some[word];
        if (word == class / 64) some &= ~(uint64_t)0 << class % 64;
        if (some) return word * 64 + __builtin_ctzll(some);
    }
    return -1;
}

/* The smallest of some blocks of a class that hold so much, or NULL. */
static block_t *smallest(const part_t *part, int class, size_t size) {
    block_t *best = NULL;
    int looks = 0;
    for (block_t *block = part->free[class]; block && looks++ < LOOKS; block = block->older) {
        if (block->size < size || (best && block->size >= best->size)) continue;
        best = block;
        if (best->size == size) break;
    }
    return best;
}

/* Make a block out of memory that is nobody's. */
static block_t *block_at(char *memory, size_t size, block_t *before, state_t state) {
    block_t *block = (block_t *)memory;
    ASAN_UNPOISON_MEMORY_REGION(memory, LINE);
    *block = (block_t){.size = size, .before = before, .state = state};
    return block;
}

/* Hand whole pages to the system; what is in them is lost. */
static void hand_back(char *begin, char *end) {
    uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
    uintptr_t first = ((uintptr_t)begin + page - 1) / page * page;
    uintptr_t last = (uintptr_t)end / page * page;
    if (first >= last) return;
#if defined(__linux__)
    madvise((void *)first, last - first, MADV_DONTNEED);
#elif defined(MADV_FREE)
    madvise((void *)first, last - first, MADV_FREE);
#endif
}

/* Hand the pages of the largest free blocks back until so much is kept at most. */
static void keep_at_most(part_t *part, size_t bytes) {
    for (int class = CLASSES - 1; class >= 0; class--) {
        for (block_t *block = part->free[class]; block; block = block->older) {
            if (arena.kept <= bytes) return;
            if (block->state != FREE) continue;
            hand_back((char *)block + LINE, (char *)block + block->size);
            block->state = FREE_WITHOUT_PAGES;
            arena.kept -= block->size;
        }
    }
}

/* Move the top up by a new block; NULL where there is no memory. */
static block_t *above(part_t *part, size_t size) {
    if ((size_t)(part->end - part->top) < size) return NULL;
    char *top = part->top + size;
    if (top > part->accessible) {
        size_t left = (size_t)(part->end - part->accessible);
        size_t more = ((size_t)(top - part->accessible) + GROWTH - 1) / GROWTH * GROWTH;
        if (more > left) more = left;
        if (mprotect(part->accessible, more, PROT_READ | PROT_WRITE)) return NULL;
        ASAN_POISON_MEMORY_REGION(part->accessible, more);
        part->accessible += more;
    }
    if (top > part->high) {
        size_t most = arena.used + size > arena.peak ? arena.used + size : arena.peak;
        arena.kept -= (size_t)(part->high - part->top);
        part->high = top;
        if (part == &arena.large)
            keep_at_most(part, most + most / SLACK_SHARE + SLACK_BYTES - arena.used - size);
    } else
        arena.kept -= size;
    part->last = block_at(part->top, size, part->last, IN_USE);
    part->top = top;
    return part->last;
}

static block_t *take(part_t *part, size_t size) {
    int class = class_of(size);
    block_t *block = smallest(part, class, size);
    if (!block && class + 1 < CLASSES && (class = class_with_some(part, class + 1)) >= 0)
        block = smallest(part, class, size);
    if (!block) return above(part, size);
    unlink_block(part, block);
    size_t rest = block->size - size;
    if (block->state == FREE) arena.kept -= block->size;
    if (rest >= HEAD + LINE) {
        block_t *next = after(part, block);
        block_t *other = block_at((char *)block + size, rest, block, block->state);
        block->size = size;
        next->before = other; /* there is one: none that is free ends at the top */
        if (other->state == FREE) arena.kept += rest;
        link_block(part, other);
    }
    block->state = IN_USE;
    return block;
}

static void give(part_t *part, block_t *block) {
    block_t *next = after(part, block), *before = block->before;
    size_t size = block->size;
    block->state = FREE;
    arena.kept += size;
    if (is_free(next)) {
        unlink_block(part, next);
        if (next->state == FREE_WITHOUT_PAGES) arena.kept += next->size;
        size += next->size;
        ASAN_POISON_MEMORY_REGION(next, LINE);
    }
    if (is_free(before)) {
        unlink_block(part, before);
        if (before->state == FREE_WITHOUT_PAGES) arena.kept += before->size;
        size += before->size;
        ASAN_POISON_MEMORY_REGION(block, LINE);
        block = before;
        block->state = FREE;
    }
    block->size = size;
    next = after(part, block);
    if (next) {
        next->before = block;
        link_block(part, block);
    } else {
        part->top = (char *)block;
        part->last = block->before;
        ASAN_POISON_MEMORY_REGION(block, LINE);
    }
}

/* Memory from the C library, for what finds no place. */
static block_t *alone(size_t size) {
    void *memory = NULL;
    if (posix_memalign(&memory, LINE, size)) return NULL;
    return block_at(memory, size, NULL, ALONE);
}

void *loopos_take(size_t bytes) {
    if (bytes > (size_t)-1 / 4) return NULL;
    pthread_once(&once, initialise);
    size_t size = (bytes + (bytes == 0) + GUARD + LINE - 1) / LINE * LINE + HEAD;
    pthread_mutex_lock(&arena.lock);
    block_t *block = take(bytes < SMALL ? &arena.small : &arena.large, size);
    if (!block) block = alone(size);
    if (block) {
        arena.used += block->size;
        if (arena.used > arena.peak) arena.peak = arena.used;
    }
    pthread_mutex_unlock(&arena.lock);
    if (!block) return NULL;
    char *memory = (char *)block + HEAD;
    ASAN_POISON_MEMORY_REGION((char *)block + LINE, block->size - LINE);
    ASAN_UNPOISON_MEMORY_REGION(memory, bytes);
    return memory;
}

void loopos_give(void *memory) {
    block_t *block = (block_t *)((char *)memory - HEAD);
    ASAN_POISON_MEMORY_REGION(memory, block->size - HEAD);
    pthread_mutex_lock(&arena.lock);
    arena.used -= block->size;
    if (block->state == ALONE) {
        ASAN_UNPOISON_MEMORY_REGION(block, block->size);
        free(block);
    } else
        give(part_of(block), block);
    pthread_mutex_unlock(&arena.lock);
}

void loopos_arena_state(size_t *used, size_t *kept, size_t *peak) {
    pthread_mutex_lock(&arena.lock);
    *used = arena.used;
    *kept = arena.kept;
    *peak = arena.peak;
    pthread_mutex_unlock(&arena.lock);
}

static void trim(part_t *part) {
    keep_at_most(part, 0);
    hand_back(part->top, part->high);
    arena.kept -= (size_t)(part->high - part->top);
    part->high = part->top;
}

void loopos_arena_trim(void) {
    pthread_mutex_lock(&arena.lock);
    trim(&arena.small);
    trim(&arena.large);
    arena.peak = arena.used;
    pthread_mutex_unlock(&arena.lock);
#if defined(__GLIBC__)
    malloc_trim(0); /* what lay on the heap is the C library's to hand on */
#endif
}
