/* x86-64-v2; nothing for the other half of a universal binary. */
#if defined(__x86_64__)
#define LOOPOS_LEVEL v2
#include "level.c.inc"
#endif
