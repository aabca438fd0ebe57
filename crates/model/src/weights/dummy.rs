//! Made-up weights of a config's shapes (`--load-format dummy`): for timing shapes whose weights are not at hand.
//!
//! Every element is a function of the tensor's name and its place, made when its row is read, so nothing large is ever
//! allocated and every run, on every machine, has the same weights. The scale keeps activations near one: norms are
//! near 1 (where a family adds one to them, near 0), matrices have variance 1 / inputs, biases are small.

/// The numbers of one tensor.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Generator {
    seed: u64,
    /// Values lie in `center` ± `spread`.
    center: f32,
    spread: f32,
}

impl Generator {
    /// A weight matrix with `cols` inputs.
    pub(super) fn matrix(name: &str, cols: usize) -> Self {
        // A uniform number in ±a has variance a² / 3.
        Self { seed: fnv1a(name), center: 0.0, spread: (3.0 / cols as f32).sqrt() }
    }

    /// A norm's weights, around `center`.
    pub(super) fn norm(name: &str, center: f32) -> Self {
        Self { seed: fnv1a(name), center, spread: 0.05 }
    }

    /// A bias.
    pub(super) fn bias(name: &str) -> Self {
        Self { seed: fnv1a(name), center: 0.0, spread: 0.02 }
    }

    /// Row `row`, `out: [cols]`.
    pub(super) fn fill_row(&self, row: usize, out: &mut [f32]) {
        let row_seed = mix(self.seed ^ mix(row as u64));
        for (pair, out) in out.chunks_mut(2).enumerate() {
            let bits = mix(row_seed.wrapping_add(pair as u64));
            for (out, bits) in out.iter_mut().zip([(bits >> 32) as u32, bits as u32]) {
                // 24 bits are exact in f32.
                let unit = (bits >> 8) as f32 / (1u32 << 23) as f32 - 1.0;
                *out = self.center + self.spread * unit;
            }
        }
    }
}

/// SplitMix64's finaliser over a stepped counter (Steele, Lea and Flood 2014): good bits at any index, no state.
fn mix(index: u64) -> u64 {
    let mut z = index.wrapping_mul(0x9E37_79B9_7F4A_7C15).wrapping_add(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// The FNV-1a hash: names to seeds that never change between versions of the standard library.
fn fnv1a(name: &str) -> u64 {
    name.bytes().fold(0xCBF2_9CE4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01B3))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_differ_repeat_and_have_the_promised_spread() {
        let generator = Generator::matrix("blk.0.attn_q.weight", 4096);
        let (mut a, mut b) = (vec![0.0; 4096], vec![0.0; 4096]);
        generator.fill_row(3, &mut a);
        generator.fill_row(3, &mut b);
        assert_eq!(a, b);
        generator.fill_row(4, &mut b);
        assert_ne!(a, b);
        let mean = a.iter().sum::<f32>() / 4096.0;
        let variance = a.iter().map(|x| x * x).sum::<f32>() / 4096.0;
        assert!(mean.abs() < 0.001, "{mean}");
        // Three standard errors of the variance of 4096 uniform numbers are some 4 per cent.
        assert!((variance * 4096.0 - 1.0).abs() < 0.05, "{variance}");
    }
}
