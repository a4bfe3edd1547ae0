/* x86-64-v4; nothing for the other half of a universal binary. */
#if defined(__x86_64__)
#define LOOPOS_LEVEL v4
#include "level.c.inc"
#endif
