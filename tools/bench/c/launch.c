/* Write the time of CLOCK_MONOTONIC in nanoseconds, and execute a command: so a start is timed without its caller.
 *
 *     launch [--without MOUNTPOINT] COMMAND...
 *
 * MOUNTPOINT is not there for the command: crun 1.8 refuses a host that has cgroup v1 and v2 mounted.
 */

#define _GNU_SOURCE
#include <err.h>
#include <sched.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <time.h>
#include <unistd.h>

static void hide(const char *mountpoint)
{
    if (unshare(CLONE_NEWNS) < 0)
        err(1, "unshare");
    if (mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) < 0)
        err(1, "mount MS_PRIVATE");
    if (umount2(mountpoint, MNT_DETACH) < 0)
        err(1, "umount %s", mountpoint);
}

int main(int count, char **arguments)
{
    if (count > 2 && strcmp(arguments[1], "--without") == 0) {
        hide(arguments[2]);
        arguments += 2;
    }
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    dprintf(STDOUT_FILENO, "%lld\n", time.tv_sec * 1000000000LL + time.tv_nsec);
    execvp(arguments[1], arguments + 1);
    err(1, "%s", arguments[1]);
}
