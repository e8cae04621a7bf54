/* Threads that are made and joined, and a number that two of them hand to each other under a lock. */
#include <pthread.h>
#include <stdio.h>

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static int number;

static void *own(void *argument) {
    return (void *)((long)argument * 3);
}

static void *take_turns(void *argument) {
    int mine = (int)(long)argument;
    for (int i = 0; i < 5000; i++) {
        pthread_mutex_lock(&lock);
        while (number % 2 != mine) pthread_cond_wait(&changed, &lock);
        number++;
        pthread_cond_signal(&changed);
        pthread_mutex_unlock(&lock);
    }
    return NULL;
}

int main(void) {
    long sum = 0;
    pthread_t a, b;
    for (long i = 0; i < 2000; i++) {
        void *result;
        if (pthread_create(&a, NULL, own, (void *)i) || pthread_join(a, &result)) return 1;
        sum += (long)result;
    }
    if (pthread_create(&a, NULL, take_turns, (void *)0) || pthread_create(&b, NULL, take_turns, (void *)1)) return 1;
    pthread_join(a, NULL);
    pthread_join(b, NULL);
    printf("%ld %d\n", sum, number);
    return 0;
}
