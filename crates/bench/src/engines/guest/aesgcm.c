/* AES-256-GCM by OpenSSL's library, which takes the CPU's AES and carry-less multiplication instructions. */
#include <stdio.h>
#include <string.h>
typedef struct evp_cipher_ctx_st EVP_CIPHER_CTX;
typedef struct evp_cipher_st EVP_CIPHER;
typedef struct engine_st ENGINE;
EVP_CIPHER_CTX *EVP_CIPHER_CTX_new(void);
const EVP_CIPHER *EVP_aes_256_gcm(void);
int EVP_EncryptInit_ex(EVP_CIPHER_CTX *c, const EVP_CIPHER *t, ENGINE *e, const unsigned char *key, const unsigned char *iv);
int EVP_EncryptUpdate(EVP_CIPHER_CTX *c, unsigned char *out, int *len, const unsigned char *in, int in_len);
int EVP_EncryptFinal_ex(EVP_CIPHER_CTX *c, unsigned char *out, int *len);
int EVP_CIPHER_CTX_ctrl(EVP_CIPHER_CTX *c, int type, int arg, void *ptr);

static unsigned char in[1 << 18], out[(1 << 18) + 16], key[32], iv[12], tag[16];

int main(void) {
    EVP_CIPHER_CTX *context = EVP_CIPHER_CTX_new();
    int length;
    for (unsigned i = 0; i < sizeof in; i++) in[i] = i * 7 + (i >> 8);
    memset(key, 42, sizeof key);
    if (!EVP_EncryptInit_ex(context, EVP_aes_256_gcm(), NULL, key, iv)) return 1;
    for (int i = 0; i < 1000; i++)
        if (!EVP_EncryptUpdate(context, out, &length, in, sizeof in)) return 1;
    if (!EVP_EncryptFinal_ex(context, out, &length)) return 1;
    if (!EVP_CIPHER_CTX_ctrl(context, 0x10, 16, tag)) return 1;
    for (int i = 0; i < 16; i++) printf("%02x", tag[i]);
    puts("");
    return 0;
}
