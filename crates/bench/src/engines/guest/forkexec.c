/* A process that starts others and waits for each. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

int main(int argc, char **argv) {
    int sum = 0;
    if (argc > 1) return atoi(argv[1]);
    for (int i = 0; i < 100; i++) {
        char text[16];
        int status;
        snprintf(text, sizeof text, "%d", i % 100);
        pid_t child = fork();
        if (child == 0) {
            execl(argv[0], argv[0], text, (char *)0);
            _exit(127);
        }
        if (waitpid(child, &status, 0) != child) return 1;
        sum += WEXITSTATUS(status);
    }
    printf("%d\n", sum);
    return 0;
}
