/* The least that a container from an image costs: the system calls, one after the other, and nothing around them.
 *
 *     limit IMAGE DIRECTORY
 *
 * IMAGE is a squashfs; DIRECTORY is empty and on a tmpfs, as an overlay's upper directory must be. Each line that is
 * read from standard input is the path of a command in the image, for which one round is made: loop device, squashfs,
 * overlay, namespaces, special file systems, pivot_root, execve; SIGTERM; and everything back. The command writes the
 * time of CLOCK_MONOTONIC (ns) as its first line. The answer is one line of moments as `name=nanoseconds`, counted
 * from the first system call of the round. A failed call ends the program, with its words on standard error.
 */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/loop.h>
#include <linux/sched.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum phase {
    ATTACHED, LOWER, ROOT,                       /* what stands before there is a process */
    CLONED, PRIVATE, SPECIAL, NODES, PIVOTED,    /* the child's, up to its execve */
    EXECUTED, ASKED, ENDED,                      /* the command's first instruction, our SIGTERM, its end */
    ROOT_GONE, LOWER_GONE, DETACHED, PHASES
};

static const char *const names[PHASES] = {
    "attached", "lower", "root", "cloned", "private", "special", "nodes", "pivoted",
    "executed", "asked", "ended", "root_gone", "lower_gone", "detached",
};

/* Moments of this round in nanoseconds; shared memory, since the child writes some of them. */
static long long *moments;

static char lower[256], upper[256], work[256], root[256], layers[1024];

static int checked(int result, const char *what)
{
    if (result < 0) {
        fprintf(stderr, "%s: %s\n", what, strerror(errno));
        _exit(1);
    }
    return result;
}

static long long now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1000000000LL + time.tv_nsec;
}

/* ---------------------------------------------------------------------------------------------- the image */

/* Attach the file to a free loop device; others may take the one we are offered, then we ask again. */
static int attach(int file, char *device, size_t size)
{
    struct loop_config config = {.fd = file, .info.lo_flags = LO_FLAGS_READ_ONLY};
    int control = checked(open("/dev/loop-control", O_RDWR | O_CLOEXEC), "/dev/loop-control");
    for (;;) {
        snprintf(device, size, "/dev/loop%d", checked(ioctl(control, LOOP_CTL_GET_FREE), "LOOP_CTL_GET_FREE"));
        int loop = checked(open(device, O_RDONLY | O_CLOEXEC), device);
        if (ioctl(loop, LOOP_CONFIGURE, &config) == 0) {
            close(control);
            return loop;
        }
        close(loop);
        if (errno != EBUSY)
            checked(-1, "LOOP_CONFIGURE");
    }
}

static int mount_layers(int file)
{
    char device[32];
    int loop = attach(file, device, sizeof device);
    moments[ATTACHED] = now();
    checked(mount(device, lower, "squashfs", MS_RDONLY, NULL), "mount squashfs");
    moments[LOWER] = now();
    checked(mount("overlay", root, "overlay", 0, layers), "mount overlay");
    moments[ROOT] = now();
    return loop;
}

static void unmount_layers(int loop)
{
    checked(umount2(root, 0), root);
    moments[ROOT_GONE] = now();
    checked(umount2(lower, 0), lower);
    moments[LOWER_GONE] = now();
    checked(ioctl(loop, LOOP_CLR_FD), "LOOP_CLR_FD");
    close(loop);
    moments[DETACHED] = now();
}

/* ------------------------------------------------------------------------------------- the child: its root */

static void mount_special(void)
{
    const unsigned long kernels = MS_NOSUID | MS_NODEV | MS_NOEXEC;
    checked(mount("proc", "proc", "proc", kernels, NULL), "mount proc");
    checked(mount("tmpfs", "dev", "tmpfs", MS_NOSUID | MS_STRICTATIME, "mode=755"), "mount dev");
    checked(mkdir("dev/shm", 0755) | mkdir("dev/mqueue", 0755) | mkdir("dev/pts", 0755), "mkdir in dev");
    checked(mount("tmpfs", "dev/shm", "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777"), "mount dev/shm");
    checked(mount("mqueue", "dev/mqueue", "mqueue", kernels, NULL), "mount dev/mqueue");
    checked(mount("devpts", "dev/pts", "devpts", MS_NOSUID | MS_NOEXEC,
                  "newinstance,ptmxmode=0666,mode=0620,gid=5"), "mount dev/pts");
    checked(mount("sysfs", "sys", "sysfs", kernels, NULL), "mount sys");
}

static void make_nodes(void)
{
    static const struct { const char *path; unsigned major, minor; } nodes[] = {
        {"dev/null", 1, 3}, {"dev/zero", 1, 5}, {"dev/full", 1, 7},
        {"dev/tty", 5, 0}, {"dev/random", 1, 8}, {"dev/urandom", 1, 9},
    };
    static const char *const links[][2] = {
        {"/dev/pts/ptmx", "dev/ptmx"}, {"/proc/self/fd", "dev/fd"}, {"/proc/self/fd/0", "dev/stdin"},
        {"/proc/self/fd/1", "dev/stdout"}, {"/proc/self/fd/2", "dev/stderr"},
    };
    umask(0);
    for (size_t i = 0; i < sizeof nodes / sizeof *nodes; i++)
        checked(mknod(nodes[i].path, S_IFCHR | 0666, makedev(nodes[i].major, nodes[i].minor)), nodes[i].path);
    for (size_t i = 0; i < sizeof links / sizeof *links; i++)
        checked(symlink(links[i][0], links[i][1]), links[i][1]);
}

static _Noreturn void become(char *command, int output)
{
    char *arguments[] = {command, NULL}, *environment[] = {"PATH=/bin", NULL};
    moments[CLONED] = now();
    checked(mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL), "mount MS_PRIVATE");
    moments[PRIVATE] = now();
    checked(chdir(root), root);
    mount_special();
    moments[SPECIAL] = now();
    make_nodes();
    moments[NODES] = now();
    checked(syscall(SYS_pivot_root, ".", "."), "pivot_root");
    checked(umount2(".", MNT_DETACH), "umount the old root");
    checked(chdir("/"), "chdir");
    checked(sethostname("limit", 5), "sethostname");
    moments[PIVOTED] = now();
    checked(dup2(output, STDOUT_FILENO), "dup2");
    execve(command, arguments, environment);
    checked(-1, command);
    _exit(1);
}

/* ------------------------------------------------------------------------------------------- the process */

/* Clone it in new namespaces: its pidfd. */
static int start(char *command, int output)
{
    int pidfd = -1;
    struct clone_args arguments = {
        .flags = CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_PIDFD,
        .pidfd = (unsigned long)&pidfd,
        .exit_signal = SIGCHLD,
    };
    if (checked(syscall(SYS_clone3, &arguments, sizeof arguments), "clone3") == 0)
        become(command, output);
    return pidfd;
}

static long long read_time(int from)
{
    char text[64] = "";
    checked(read(from, text, sizeof text - 1), "read the command's output");
    return atoll(text);
}

/* Ask it to end, unless it has, and wait until it did. */
static void stop(int pidfd)
{
    siginfo_t end;
    moments[ASKED] = now();
    checked(syscall(SYS_pidfd_send_signal, pidfd, SIGTERM, NULL, 0) < 0 && errno != ESRCH ? -1 : 0, "SIGTERM");
    checked(waitid(P_PIDFD, pidfd, &end, WEXITED), "waitid");
    moments[ENDED] = now();
    if (end.si_code != CLD_EXITED || end.si_status != 0) {
        fprintf(stderr, "the command ended with %d\n", end.si_status);
        _exit(1);
    }
    close(pidfd);
}

static void run(char *command)
{
    int output[2];
    checked(pipe2(output, O_CLOEXEC), "pipe2");
    int pidfd = start(command, output[1]);
    close(output[1]);
    moments[EXECUTED] = read_time(output[0]);
    stop(pidfd);
    close(output[0]);
}

/* -------------------------------------------------------------------------------------------- the rounds */

static void tell(long long begun)
{
    for (int phase = 0; phase < PHASES; phase++)
        printf("%s=%lld%c", names[phase], moments[phase] - begun, phase == PHASES - 1 ? '\n' : ' ');
    fflush(stdout);
}

static void one_round(const char *image, char *command)
{
    long long begun = now();
    int file = checked(open(image, O_RDONLY | O_CLOEXEC), image);
    int loop = mount_layers(file);
    run(command);
    unmount_layers(loop);
    close(file);
    tell(begun);
}

static void make_directory(char *path, size_t size, const char *parent, const char *name)
{
    snprintf(path, size, "%s/%s", parent, name);
    checked(mkdir(path, 0755), path);
}

int main(int count, char **arguments)
{
    if (count != 3) {
        fprintf(stderr, "usage: limit IMAGE DIRECTORY\n");
        return 2;
    }
    make_directory(lower, sizeof lower, arguments[2], "lower");
    make_directory(upper, sizeof upper, arguments[2], "upper");
    make_directory(work, sizeof work, arguments[2], "work");
    make_directory(root, sizeof root, arguments[2], "root");
    snprintf(layers, sizeof layers, "lowerdir=%s,upperdir=%s,workdir=%s", lower, upper, work);
    moments = mmap(NULL, PHASES * sizeof *moments, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    checked(moments == MAP_FAILED ? -1 : 0, "mmap");
    char command[256];
    while (fgets(command, sizeof command, stdin)) {
        command[strcspn(command, "\n")] = '\0';
        one_round(arguments[1], command);
    }
    return 0;
}
