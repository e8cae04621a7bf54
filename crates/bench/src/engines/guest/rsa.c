/* The heart of an RSA private-key operation: constant-time modular exponentiation with 2048 bits, by OpenSSL's library. The image
 * has no headers of it, so the few functions used are declared here. */
#include <stdio.h>
typedef struct bignum_st BIGNUM;
typedef struct bignum_ctx BN_CTX;
typedef struct bn_mont_ctx_st BN_MONT_CTX;
int BN_hex2bn(BIGNUM **number, const char *text);
char *BN_bn2hex(const BIGNUM *number);
BIGNUM *BN_new(void);
BN_CTX *BN_CTX_new(void);
int BN_mod_exp_mont_consttime(BIGNUM *r, const BIGNUM *a, const BIGNUM *p, const BIGNUM *m, BN_CTX *ctx, BN_MONT_CTX *mont);

static void fill(char *text, unsigned seed) {
    for (int i = 0; i < 512; i++) {
        seed = seed * 1103515245u + 12345u;
        text[i] = "0123456789ABCDEF"[seed >> 28];
    }
    text[0] = 'F';
    text[511] = 'B';
    text[512] = 0;
}

int main(void) {
    char text[513];
    BIGNUM *base = NULL, *exponent = NULL, *modulus = NULL, *result = BN_new();
    BN_CTX *context = BN_CTX_new();
    fill(text, 1);
    if (!BN_hex2bn(&modulus, text)) return 1;
    fill(text, 2);
    if (!BN_hex2bn(&exponent, text)) return 1;
    fill(text, 3);
    text[0] = '3';
    if (!BN_hex2bn(&base, text)) return 1;
    for (int i = 0; i < 40; i++) {
        if (!BN_mod_exp_mont_consttime(result, base, exponent, modulus, context, NULL)) return 1;
        BIGNUM *other = base;
        base = result;
        result = other;
    }
    puts(BN_bn2hex(base));
    return 0;
}
