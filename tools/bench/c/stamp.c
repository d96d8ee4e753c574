/* Write the time as the very first thing a process does, and end. */

#include "bare.h"

void _start(void)
{
    write_time();
    leave();
}
