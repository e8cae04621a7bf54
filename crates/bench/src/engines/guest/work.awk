# A Mandelbrot set: floating point in the awk interpreter.
BEGIN {
    for (y = -1; y <= 1; y += 0.05) {
        for (x = -2; x <= 0.5; x += 0.05) {
            a = b = 0
            for (n = 0; n < 60 && a * a + b * b < 4; n++) {
                t = a * a - b * b + x
                b = 2 * a * b + y
                a = t
            }
            sum += n * (x + 3) * sqrt(y + 2)
        }
    }
    printf "%.9f\n", sum
}
