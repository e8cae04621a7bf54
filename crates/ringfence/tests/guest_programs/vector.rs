//! Computes with the x87 and vector units from a seed and prints one line per unit: its name and a digest.
//!
//! Built on its own as a static program and run both on the host and in a guest, which must agree.

use std::arch::asm;
use std::arch::x86_64::*;

/// FNV-1a over the bytes of results.
fn digest(bytes: impl IntoIterator<Item = u8>) -> u64 {
    bytes.into_iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3))
}

/// Numbers of moderate size and both signs.
fn numbers(seed: u64, n: usize) -> Vec<f64> {
    let mut state = seed.wrapping_mul(2) | 1;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 11) as f64 / (1_u64 << 53) as f64
    };
    (0..n).map(|i| (next() - 0.5) * 10_f64.powi(i as i32 % 9 - 4)).collect()
}

fn x87(values: &[f64]) -> u64 {
    let mut results = Vec::new();
    for &value in values {
        let mut out = [0_u64; 2];
        let input = [value, value.abs() + 1.0];
        // SAFETY: reads two doubles, writes two, and leaves the x87 stack empty.
        unsafe {
            asm!(
                "fld qword ptr [{i}]", "fsin", "fld qword ptr [{i} + 8]", "fsqrt", "fmulp", "fst qword ptr [{o}]",
                "fldpi", "fyl2xp1", "fstp qword ptr [{o} + 8]",
                i = in(reg) input.as_ptr(), o = in(reg) out.as_mut_ptr(),
                out("st(0)") _, out("st(1)") _, out("st(2)") _, out("st(3)") _,
                out("st(4)") _, out("st(5)") _, out("st(6)") _, out("st(7)") _,
            );
        }
        results.extend(out);
    }
    digest(results.into_iter().flat_map(u64::to_le_bytes))
}

fn sse2(values: &[f64]) -> u64 {
    let mut hash = Vec::new();
    for pair in values.chunks_exact(2) {
        // SAFETY: every x86-64 CPU has SSE2.
        let bits = unsafe {
            let v = _mm_set_pd(pair[0], pair[1]);
            let w = _mm_div_pd(_mm_sqrt_pd(_mm_mul_pd(v, v)), _mm_add_pd(v, _mm_set1_pd(0.3)));
            let integers = _mm_cvttpd_epi32(_mm_mul_pd(w, _mm_set1_pd(1000.0)));
            let mixed = _mm_xor_si128(_mm_castpd_si128(w), _mm_shuffle_epi32(integers, 0x1b));
            [_mm_cvtsi128_si64(mixed), _mm_cvtsi128_si64(_mm_unpackhi_epi64(mixed, mixed))]
        };
        hash.extend(bits.into_iter().flat_map(i64::to_le_bytes));
    }
    digest(hash)
}

#[target_feature(enable = "sse4.2,aes,pclmulqdq")]
fn sse42(values: &[f64]) -> u64 {
    let mut crc = 0;
    let mut state = _mm_set1_epi8(7);
    for value in values {
        crc = _mm_crc32_u64(crc, value.to_bits());
        let key = _mm_set_epi64x(value.to_bits() as i64, crc as i64);
        state = _mm_aesenc_si128(_mm_clmulepi64_si128(state, key, 0x10), _mm_shuffle_epi8(key, state));
        state = _mm_min_epi8(_mm_blendv_epi8(state, key, key), _mm_mullo_epi32(state, key));
    }
    crc ^ (_mm_extract_epi64(state, 0) ^ _mm_extract_epi64(state, 1)) as u64
}

#[target_feature(enable = "avx2,fma,f16c")]
fn avx2(values: &[f64]) -> u64 {
    let table: Vec<i64> = values.iter().map(|value| value.to_bits() as i64).collect();
    let mut sum = _mm256_setzero_pd();
    let mut mixed = _mm256_setzero_si256();
    for four in values.chunks_exact(4) {
        // SAFETY: the chunk holds four doubles; the gather's indices are below the table's length.
        unsafe {
            let v = _mm256_loadu_pd(four.as_ptr());
            sum = _mm256_fmadd_pd(v, _mm256_permute4x64_pd(v, 0x4e), sum);
            let index = _mm_and_si128(_mm256_cvttpd_epi32(_mm256_mul_pd(v, _mm256_set1_pd(100.0))), _mm_set1_epi32(31));
            let gathered = _mm256_i32gather_epi64::<8>(table.as_ptr(), index);
            mixed = _mm256_add_epi64(_mm256_sllv_epi64(mixed, _mm256_set1_epi64x(1)), gathered);
            let halves = _mm_cvtps_ph::<0>(_mm256_cvtpd_ps(v));
            mixed = _mm256_xor_si256(mixed, _mm256_cvtepu8_epi32(halves));
        }
    }
    let mut out = [0_u8; 64];
    // SAFETY: both stores lie inside `out`.
    unsafe {
        _mm256_storeu_pd(out.as_mut_ptr().cast(), sum);
        _mm256_storeu_si256(out.as_mut_ptr().add(32).cast(), mixed);
    }
    digest(out)
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn avx512(values: &[f64]) -> u64 {
    let mut sum = _mm512_setzero_pd();
    for eight in values.chunks_exact(8) {
        // SAFETY: the chunk holds eight doubles.
        let v = unsafe { _mm512_loadu_pd(eight.as_ptr()) };
        let positive = _mm512_cmp_pd_mask::<_CMP_GT_OQ>(v, _mm512_setzero_pd());
        sum = _mm512_mask_fmadd_pd(sum, positive, v, _mm512_set1_pd(1.5));
        sum = _mm512_add_pd(sum, _mm512_maskz_compress_pd(positive, v));
    }
    let mut out = [0_u8; 64];
    // SAFETY: the store fills `out`.
    unsafe { _mm512_storeu_pd(out.as_mut_ptr().cast(), sum) };
    digest(out)
}

fn main() {
    let seed = std::env::args().nth(1).and_then(|word| word.parse().ok()).unwrap_or(1);
    let values = numbers(seed, 256);
    println!("x87 {:016x}", x87(&values));
    println!("sse2 {:016x}", sse2(&values));
    if is_x86_feature_detected!("sse4.2") && is_x86_feature_detected!("aes") && is_x86_feature_detected!("pclmulqdq") {
        // SAFETY: just detected.
        println!("sse42 {:016x}", unsafe { sse42(&values) });
    }
    if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c") {
        // SAFETY: just detected.
        println!("avx2 {:016x}", unsafe { avx2(&values) });
    }
    if is_x86_feature_detected!("avx512bw") && is_x86_feature_detected!("avx512vl") {
        // SAFETY: just detected.
        println!("avx512 {:016x}", unsafe { avx512(&values) });
    }
}
