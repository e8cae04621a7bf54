/* Product of two matrices of doubles, by AVX2 and fused multiply-add. */
#include <stdio.h>
#define N 480
static double a[N][N], b[N][N], c[N][N];

int main(void) {
    for (int i = 0; i < N; i++)
        for (int j = 0; j < N; j++) {
            a[i][j] = (i * 31 + j * 17) % 101 / 8.0;
            b[i][j] = (i * 13 + j * 29) % 97 / 16.0;
        }
    for (int round = 0; round < 4; round++)
        for (int i = 0; i < N; i++)
            for (int k = 0; k < N; k++) {
                double x = a[i][k];
                for (int j = 0; j < N; j++) c[i][j] += x * b[k][j];
            }
    double sum = 0;
    for (int i = 0; i < N; i++)
        for (int j = 0; j < N; j++) sum += c[i][j] * ((i ^ j) & 15);
    printf("%.17g\n", sum);
    return 0;
}
