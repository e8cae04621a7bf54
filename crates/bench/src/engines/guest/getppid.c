/* The shortest system call there is. */
#include <stdio.h>
#include <sys/syscall.h>
#include <unistd.h>

int main(void) {
    long same = 0, parent = syscall(SYS_getppid);
    for (int i = 0; i < 500000; i++) same += syscall(SYS_getppid) == parent;
    printf("%ld\n", same);
    return 0;
}
