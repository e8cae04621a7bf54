/* One byte to and fro between two processes through pipes. */
#include <stdio.h>
#include <sys/wait.h>
#include <unistd.h>

int main(void) {
    int there[2], back[2];
    unsigned char byte = 1;
    if (pipe(there) || pipe(back)) return 1;
    if (fork() == 0) {
        close(there[1]);
        while (read(there[0], &byte, 1) == 1) {
            byte++;
            if (write(back[1], &byte, 1) != 1) _exit(1);
        }
        _exit(0);
    }
    close(there[0]);
    for (int i = 0; i < 20000; i++)
        if (write(there[1], &byte, 1) != 1 || read(back[0], &byte, 1) != 1) return 1;
    close(there[1]);
    wait(NULL);
    printf("%u\n", byte);
    return 0;
}
