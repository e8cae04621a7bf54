/* measure COMMAND-FILE RUNS: runs `/bin/sh COMMAND-FILE` RUNS times with its output in /tmp/result, and prints after each
 * how long it took by the monotonic clock, how it ended, and its processor time (which means something natively only). */
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec + time.tv_nsec / 1e9;
}

/* Processor time of all children so far. */
static double processor(void) {
    struct rusage usage;
    getrusage(RUSAGE_CHILDREN, &usage);
    return usage.ru_utime.tv_sec + usage.ru_stime.tv_sec + (usage.ru_utime.tv_usec + usage.ru_stime.tv_usec) / 1e6;
}

int main(int argc, char **argv) {
    if (argc != 3) return 2;
    for (int run = 0; run < atoi(argv[2]); run++) {
        double start = now(), before = processor();
        pid_t child = fork();
        if (child < 0) return 3;
        if (child == 0) {
            int out = open("/tmp/result", O_WRONLY | O_CREAT | O_TRUNC, 0600);
            if (out < 0 || dup2(out, 1) < 0) _exit(126);
            execl("/bin/sh", "sh", argv[1], (char *)0);
            _exit(127);
        }
        int status = 0;
        if (waitpid(child, &status, 0) != child) return 4;
        double took = now() - start;
        int code = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
        printf("@time %.6f %d %.6f\n", took, code, processor() - before);
        fflush(stdout);
    }
    return 0;
}
