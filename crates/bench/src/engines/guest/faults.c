/* Memory that is mapped, touched page by page and given back. */
#include <stdio.h>
#include <sys/mman.h>

int main(void) {
    unsigned long sum = 0, size = 8 << 20;
    for (int round = 0; round < 10; round++) {
        unsigned char *p = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (p == MAP_FAILED || madvise(p, size, MADV_NOHUGEPAGE)) return 1;
        for (unsigned long at = 0; at < size; at += 4096) {
            p[at] = at >> 12;
            sum += p[at + 1] + p[at];
        }
        munmap(p, size);
    }
    printf("%lu\n", sum);
    return 0;
}
