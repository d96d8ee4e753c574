/* What a program without a C library needs: system calls, and the time written as the first of them. */

#include <asm/unistd.h>

enum { MONOTONIC = 1, STDOUT = 1 };

struct moment {
    long seconds, nanoseconds;
};

static long call(long number, long a, long b, long c, long d)
{
#if defined __x86_64__
    long result;
    register long fourth __asm__("r10") = d;
    __asm__ volatile("syscall"
                     : "=a"(result)
                     : "a"(number), "D"(a), "S"(b), "d"(c), "r"(fourth)
                     : "rcx", "r11", "memory");
    return result;
#elif defined __aarch64__
    register long which __asm__("x8") = number;
    register long first __asm__("x0") = a;
    register long second __asm__("x1") = b;
    register long third __asm__("x2") = c;
    register long fourth __asm__("x3") = d;
    __asm__ volatile("svc 0" : "+r"(first) : "r"(which), "r"(second), "r"(third), "r"(fourth) : "memory");
    return first;
#else
#error "the calling convention of system calls on this machine is not written down here"
#endif
}

/* Write a line with the nanoseconds of CLOCK_MONOTONIC. */
static void write_time(void)
{
    struct moment now;
    call(__NR_clock_gettime, MONOTONIC, (long)&now, 0, 0);
    char text[24], *end = text + sizeof text, *at = end;
    *--at = '\n';
    for (unsigned long left = now.seconds * 1000000000ul + now.nanoseconds; left; left /= 10)
        *--at = '0' + left % 10;
    call(__NR_write, STDOUT, (long)at, end - at, 0);
}

static _Noreturn void leave(void)
{
    for (;;)
        call(__NR_exit_group, 0, 0, 0, 0);
}
