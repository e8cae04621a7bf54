/* memcpy, memset and strlen of several sizes, from the C library. */
#include <stdio.h>
#include <string.h>

static char from[1 << 20], to[1 << 20];

int main(void) {
    unsigned long sum = 0;
    memset(from, 'x', sizeof from - 1);
    for (unsigned round = 0; round < 400; round++) {
        memcpy(to, from, sizeof to);
        to[1000 + round * 2000 % 900000] = 0;
        sum += strlen(to);
        __asm__ volatile("" : : "r"(to) : "memory");
    }
    for (unsigned round = 0; round < 3000000; round++) {
        unsigned size = round * 37 % 300;
        memcpy(to + size, from + round % 64, size);
        to[size + size] = 0;
        sum += strlen(to + size);
        __asm__ volatile("" : : "r"(to) : "memory");
    }
    printf("%lu\n", sum);
    return 0;
}
