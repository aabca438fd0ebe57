//! One family of properties for every instruction set: each is held against the scalar twin, bit for bit.
//!
//! Equality is asked for, not closeness: all sets follow the scalar twin's order with the same fused operations, so
//! there is no tolerance to choose. NaN counts as equal to NaN. What the machine lacks is skipped aloud.
#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "tests")]

mod common;
#[path = "properties/products.rs"]
mod products;

use std::ops::Range;
use std::sync::OnceLock;

use bindery_kernels::{
    Activation, Activations, AttentionArgs, Cpu, Form, Isa, KvDtype, KvShape, LayerNorm, Norm, RopeStyle, SparseBlocks,
};
use common::{Family, Paged, Random, W4, W4_WITH_MINS, bits, gate_and_up, gated, product};
use products::{
    check_gated, check_gated_of, check_leftovers, check_low_rank, check_low_rank_of, check_mixture, check_product,
    check_product_alone, check_product_independence, extreme_codes, gated_case, low_rank_case, mixture_case,
};
use proptest::prelude::*;

/// The set's kernels and the scalar twin's, or none with a word on stderr. Made once: thousands of cases would make thousands of
/// threads, and an emulator keeps something of each.
fn pair(isa: Isa) -> Option<(&'static Cpu, &'static Cpu)> {
    static CPUS: [OnceLock<Cpu>; Isa::ALL.len()] = [const { OnceLock::new() }; Isa::ALL.len()];
    if !isa.is_available() {
        eprintln!("skipped: this machine has no {isa}");
        return None;
    }
    let [cpu, scalar] = [isa, Isa::Scalar].map(|isa| {
        let at = Isa::ALL.iter().position(|&each| each == isa).unwrap();
        CPUS[at].get_or_init(|| Cpu::new(isa, 2))
    });
    Some((cpu, scalar))
}

fn family() -> impl Strategy<Value = Family> {
    proptest::sample::select(Family::all())
}

/// Rows with now and then something that is no number in them.
fn rows(random: &mut Random, len: usize, strange: bool) -> Vec<f32> {
    let mut x = random.vec(len);
    if strange && len > 0 {
        let values = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1e38, -1e38, 1e-42, -0.0, f32::MIN_POSITIVE];
        for _ in 0..3 {
            x[random.below(len)] = values[random.below(values.len())];
        }
    }
    x
}

fn check_rows(isa: Isa, m: usize, k: usize, strange: bool, seed: u64) {
    let Some((cpu, scalar)) = pair(isa) else { return };
    let mut random = Random(seed);
    let x = rows(&mut random, m * k, strange);
    let (weight, bias) = (random.vec(k), random.vec(k));
    let (eps, start) = (1e-6, random.vec(m * k));
    let layer = Norm::Layer(LayerNorm { weight: &weight, bias: &bias, eps });
    for norm in [Norm::Rms { weight: &weight, eps }, layer] {
        let normed = |cpu: &Cpu| {
            let (mut out, mut in_place, mut added) = (Activations::default(), x.clone(), start.clone());
            cpu.norm(&x, m, &norm, Form::F32, &mut out);
            cpu.norm_in_place(&mut in_place, &norm);
            assert_eq!(bits(out.rows()), bits(&in_place));
            cpu.norm_add(&x, &norm, &mut added);
            let sums: Vec<f32> = start.iter().zip(&in_place).map(|(start, normed)| start + normed).collect();
            assert_eq!(bits(&added), bits(&sums));
            bits(&in_place)
        };
        assert_eq!(normed(cpu), normed(scalar));
    }
    let factors = random.vec(m);
    let scaled = |cpu: &Cpu| {
        let mut out = start.clone();
        cpu.add_scaled_rows(&x, &factors, &mut out);
        bits(&out)
    };
    assert_eq!(scaled(cpu), scaled(scalar));
    // Values in reach of the exponential's whole range.
    let logits: Vec<f32> = x.iter().map(|x| x * 60.0).collect();
    for cap in [None, Some(30.0)] {
        let capped = |cpu: &Cpu| {
            let mut logits = logits.clone();
            cpu.scale_and_cap(&mut logits, 0.7, cap);
            bits(&logits)
        };
        assert_eq!(capped(cpu), capped(scalar));
    }
    assert_eq!(cpu.max(&logits), scalar.max(&logits));
    let soft = |cpu: &Cpu| {
        let mut row = logits.clone();
        cpu.softmax(&mut row);
        bits(&row)
    };
    assert_eq!(soft(cpu), soft(scalar));
}

fn check_rope(isa: Isa, m: usize, heads: usize, head_dim: usize, rotary: usize, seed: u64) {
    let Some((cpu, scalar)) = pair(isa) else { return };
    let rotary = rotary.min(head_dim) / 2 * 2;
    let mut random = Random(seed);
    let x = random.vec(m * heads * head_dim);
    let (cos, sin) = (random.vec(m * rotary / 2), random.vec(m * rotary / 2));
    for style in [RopeStyle::Neox, RopeStyle::Interleaved] {
        let turned = |cpu: &Cpu| {
            let mut x = x.clone();
            cpu.rope(&mut x, m, heads, head_dim, rotary, style, &cos, &sin);
            bits(&x)
        };
        assert_eq!(turned(cpu), turned(scalar));
    }
}

/// The shape of an attention test.
#[derive(Clone, Debug)]
struct AttentionCase {
    shape: KvShape,
    /// The layer that attends.
    layer: usize,
    group: usize,
    contexts: Vec<usize>,
    window: Option<usize>,
    blocks: Option<SparseBlocks>,
    soft_cap: Option<f32>,
    has_biases: bool,
    seed: u64,
}

fn attention_case() -> impl Strategy<Value = AttentionCase> {
    let shape = (
        (1..=3_usize).prop_flat_map(|num_layers| (Just(num_layers), 0..num_layers)),
        1..=3_usize,
        prop_oneof![Just(16_usize), Just(32), Just(64), Just(80), 1..=70_usize],
        prop_oneof![Just(16_usize), Just(32), 1..=40_usize],
        prop_oneof![Just(KvDtype::F32), Just(KvDtype::F16), Just(KvDtype::Bf16), Just(KvDtype::Int8)],
    );
    let contexts = prop::collection::vec(prop_oneof![1..=70_usize, 1..=200_usize, 500..=1100_usize], 1..=3);
    let keys = (prop::option::of(window()), prop::option::of(pattern()));
    let scores = (keys, prop::option::of(1.0_f32..=30.0), any::<bool>());
    (shape, 1..=5_usize, contexts, scores, any::<u64>()).prop_map(|(shape, group, contexts, scores, seed)| {
        let ((num_layers, layer), num_kv_heads, head_dim, block_size, dtype) = shape;
        let ((window, blocks), soft_cap, has_biases) = scores;
        let shape = KvShape { num_layers, num_kv_heads, head_dim, block_size, dtype };
        AttentionCase { shape, layer, group, contexts, window, blocks, soft_cap, has_biases, seed }
    })
}

fn pattern() -> impl Strategy<Value = SparseBlocks> {
    let block_size = prop_oneof![Just(64_usize), Just(16), 1..=150_usize];
    (block_size, 1..=3_usize, 1..=9_usize, 0..=3_usize).prop_map(
        |(block_size, num_local_blocks, vertical_stride, head_step)| SparseBlocks {
            block_size,
            num_local_blocks,
            vertical_stride,
            head_step,
        },
    )
}

/// Shorter than a tile, and longer than a span.
fn window() -> impl Strategy<Value = usize> {
    prop_oneof![1..=70_usize, 1..=600_usize]
}

impl AttentionCase {
    fn num_heads(&self) -> usize {
        self.shape.num_kv_heads * self.group
    }

    fn with<R>(&self, cpu: &Cpu, check: impl FnOnce(&mut Paged, &AttentionArgs<'_>, &mut Random) -> R) -> R {
        let num_heads = self.num_heads();
        let num_positions = self.contexts.iter().max().unwrap().next_multiple_of(64);
        // Scores that rise with the position, from one tile to the next by less than what moves a query's reference, and by more.
        let slope = [0.0, 0.1, 0.4][(self.seed % 3) as usize];
        let noise = Random(self.seed).vec(num_heads * num_positions);
        let biases: Vec<f32> =
            noise.iter().enumerate().map(|(i, x)| 5.0 * x + slope * (i % num_positions) as f32).collect();
        let args = AttentionArgs {
            num_heads,
            scale: 1.0 / (self.shape.head_dim as f32).sqrt(),
            window: self.window,
            blocks: self.blocks,
            soft_cap: self.soft_cap,
            biases: self.has_biases.then_some(&biases[..]),
        };
        let mut paged = Paged::new(cpu, self.shape, self.layer, num_heads, &self.contexts, self.seed);
        check(&mut paged, &args, &mut Random(self.seed))
    }

    /// The same keys and values in a cache of one layer.
    fn alone(&self, cpu: &Cpu) -> Paged {
        let shape = KvShape { num_layers: 1, ..self.shape };
        Paged::new(cpu, shape, 0, self.num_heads(), &self.contexts, self.seed)
    }

    /// How many rows attend, the last of each context.
    fn draw_rows(&self, random: &mut Random) -> Vec<usize> {
        self.contexts.iter().map(|&context| 1 + random.below(context.min(40))).collect()
    }
}

fn check_attention(isa: Isa, case: &AttentionCase) {
    let Some((cpu, scalar)) = pair(isa) else { return };
    case.with(cpu, |paged, args, random| {
        let rows = case.draw_rows(random);
        let ours = paged.attend(cpu, &rows, args).concat();
        assert!(ours.iter().all(|x| x.is_finite()), "a stale slot was read");
        assert_eq!(bits(&ours), bits(&paged.attend(scalar, &rows, args).concat()));
    });
}

/// What other layers hold has no part in it. (All sets find a layer with the same lines, so the scalar twin would not tell.)
fn check_layers(isa: Isa, case: &AttentionCase) {
    let Some((cpu, _)) = pair(isa) else { return };
    case.with(cpu, |paged, args, random| {
        let rows = case.draw_rows(random);
        let ours = paged.attend(cpu, &rows, args).concat();
        assert_eq!(bits(&ours), bits(&case.alone(cpu).attend(cpu, &rows, args).concat()));
    });
}

/// A batch whose first rows see nothing of what was left behind, then row by row, each of which leaves more of it behind.
fn check_window(isa: Isa, case: &AttentionCase, window: usize) {
    let Some((cpu, _)) = pair(isa) else { return };
    case.with(cpu, |paged, args, random| {
        let args = &AttentionArgs { window: Some(window), ..*args };
        let rows = case.draw_rows(random);
        let before = paged.attend(cpu, &rows, args);
        assert!(before.concat().iter().all(|x| x.is_finite()), "a stale slot was read");
        let first_visible = |position: usize| (position + 1).saturating_sub(window);
        let first_positions: Vec<usize> =
            case.contexts.iter().zip(&rows).map(|(context, rows)| context - rows).collect();
        for (i, &position) in first_positions.iter().enumerate() {
            paged.leave_behind(cpu, i, 0..first_visible(position));
        }
        assert_eq!(bits(&paged.attend(cpu, &rows, args).concat()), bits(&before.concat()));
        for (i, before) in before.iter().enumerate() {
            let mut left = first_visible(first_positions[i]);
            let mut singles = Vec::new();
            for position in first_positions[i]..case.contexts[i] {
                paged.leave_behind(cpu, i, left..first_visible(position));
                left = first_visible(position);
                singles.extend(paged.attend_chunk(cpu, i, position..position + 1, args));
            }
            assert_eq!(bits(&singles), bits(before));
        }
    });
}

/// Of each sequence's last row: what no head's pattern lets through has no part in it.
fn check_pattern(isa: Isa, case: &AttentionCase, blocks: SparseBlocks) {
    let Some((cpu, _)) = pair(isa) else { return };
    case.with(cpu, |paged, args, _| {
        let args = &AttentionArgs { blocks: Some(blocks), ..*args };
        let rows = vec![1; case.contexts.len()];
        let before = paged.attend(cpu, &rows, args).concat();
        assert!(before.iter().all(|x| x.is_finite()), "a stale slot was read");
        for (i, &context) in case.contexts.iter().enumerate() {
            let is_hidden = |position: &usize| {
                let block = position / blocks.block_size;
                let is_local = (context - 1) / blocks.block_size - block < blocks.num_local_blocks;
                let is_seen_by =
                    |head: usize| (block + head * blocks.head_step + 1).is_multiple_of(blocks.vertical_stride);
                !is_local && !(0..case.num_heads()).any(is_seen_by)
            };
            paged.spoil(cpu, i, (0..context).filter(is_hidden));
        }
        assert_eq!(bits(&paged.attend(cpu, &rows, args).concat()), bits(&before));
    });
}

/// A sequence alone, with others, in chunks, row by row, and with other numbers of threads.
fn check_attention_independence(isa: Isa, case: &AttentionCase) {
    let Some((cpu, _)) = pair(isa) else { return };
    case.with(cpu, |paged, args, random| {
        let rows: Vec<usize> = case.contexts.iter().map(|&context| context.min(40)).collect();
        let together = paged.attend(cpu, &rows, args);
        for threads in [1, 3, 4] {
            assert_eq!(bits(&paged.attend(&Cpu::new(isa, threads), &rows, args).concat()), bits(&together.concat()));
        }
        for (i, together) in together.iter().enumerate() {
            let range = case.contexts[i] - rows[i]..case.contexts[i];
            let chunk = |range: Range<usize>| paged.attend_chunk(cpu, i, range, args);
            assert_eq!(bits(&chunk(range.clone())), bits(together));
            let mut chunks = Vec::new();
            let mut start = range.start;
            while start < range.end {
                let end = start + 1 + random.below(range.end - start);
                chunks.extend(chunk(start..end));
                start = end;
            }
            assert_eq!(bits(&chunks), bits(together));
            let singles: Vec<f32> = range.flat_map(|position| chunk(position..position + 1)).collect();
            assert_eq!(bits(&singles), bits(together));
        }
    });
}

/// More under `cargo xtask test --full`.
fn num_cases(usual: u32, full: u32) -> u32 {
    if std::env::var_os("BINDERY_TEST_FULL").is_some() { full } else { usual }
}

macro_rules! properties {
    ($($module:ident: $isa:expr;)*) => {
        $(mod $module {
            use super::*;

            proptest! {
                #![proptest_config(ProptestConfig::with_cases(num_cases(48, 1000)))]

                #[test]
                fn products_match_scalar(
                    family in family(), m in 1..=70_usize, rows in 1..=70_usize, groups in 1..=9_usize,
                    strange in any::<bool>(), seed in any::<u64>(),
                ) {
                    check_product($isa, family, m, rows, groups, strange, seed);
                }

                #[test]
                fn a_products_row_does_not_depend_on_its_neighbours(
                    family in family(), m in 1..=70_usize, rows in 1..=300_usize, groups in 1..=9_usize,
                    seed in any::<u64>(),
                ) {
                    check_product_independence($isa, family, m, rows, groups, seed);
                }

                #[test]
                fn gated_products_match_scalar(
                    case in gated_case(), m in 1..=40_usize, outputs in 1..=100_usize,
                    groups in 1..=3_usize, whole in any::<bool>(), strange in any::<bool>(), seed in any::<u64>(),
                ) {
                    // int8 wants whole groups of outputs.
                    let outputs = if whole { outputs.next_multiple_of(32) } else { outputs };
                    check_gated($isa, &case, m, outputs, groups, strange, seed);
                }

                #[test]
                fn mixtures_match_scalar_and_their_experts(
                    case in mixture_case(), m in 1..=40_usize, seed in any::<u64>(),
                ) {
                    check_mixture($isa, &case, m, seed);
                }

                #[test]
                fn low_rank_products_match_scalar_and_each_segment_alone(case in low_rank_case(), seed in any::<u64>()) {
                    check_low_rank($isa, &case, seed);
                }

                #[test]
                fn row_operations_match_scalar(
                    m in 0..=5_usize, k in 1..=700_usize, strange in any::<bool>(), seed in any::<u64>(),
                ) {
                    check_rows($isa, m, k, strange, seed);
                }

                #[test]
                fn rope_matches_scalar(
                    m in 0..=4_usize, heads in 1..=4_usize, head_dim in 2..=130_usize, rotary in 0..=130_usize,
                    seed in any::<u64>(),
                ) {
                    check_rope($isa, m, heads, head_dim, rotary, seed);
                }

                #[test]
                fn attention_matches_scalar(case in attention_case()) {
                    check_attention($isa, &case);
                }

                #[test]
                fn attention_is_to_one_layer_whatever_the_others_hold(case in attention_case()) {
                    check_layers($isa, &case);
                }

                #[test]
                fn what_a_window_has_left_behind_is_not_read(case in attention_case(), window in window()) {
                    check_window($isa, &case, window);
                }

                #[test]
                fn what_a_pattern_hides_from_all_heads_is_not_read(case in attention_case(), blocks in pattern()) {
                    check_pattern($isa, &case, blocks);
                }

                #[test]
                fn a_sequences_attention_does_not_depend_on_its_neighbours(case in attention_case()) {
                    check_attention_independence($isa, &case);
                }
            }

            /// Every count of rows around the kernels' widths, and every tail of a tile.
            #[test]
            fn small_products_match_scalar_completely() {
                for family in Family::all() {
                    for m in 1..=18 {
                        check_product($isa, family, m, 19, 2, false, m as u64);
                        check_product($isa, family, m, 1, 17, false, m as u64);
                    }
                    for rows in 1..=67 {
                        check_product($isa, family, 1, rows, 1, false, rows as u64);
                        check_product($isa, family, 5, rows, 1, true, rows as u64);
                    }
                }
            }

            /// Rows longer than what is unpacked of a tile at a time, and enough of them that tiles are.
            #[test]
            fn long_products_of_many_rows_match_scalar() {
                for family in Family::all() {
                    for (m, groups) in [(40, 49), (37, 100), (13, 97)] {
                        check_product($isa, family, m, 19, groups, m == 40, m as u64);
                    }
                }
            }

            /// Several tiles in a task, which go by turns; more of them than may wait at a time.
            #[test]
            fn long_products_of_many_tiles_match_scalar() {
                for family in Family::all() {
                    check_product_alone($isa, family, 37, 83, 100);
                    // Of several blocks of rows, too.
                    check_product_alone($isa, family, 230, 37, 49);
                }
                for family in [W4, W4_WITH_MINS] {
                    check_product_alone($isa, family, 50, 1300, 49);
                }
            }

            /// Several blocks of rows, by more outputs than one goes with.
            #[test]
            fn gated_products_of_many_rows_match_scalar() {
                for family in Family::all() {
                    check_gated_of($isa, family, 150, 192, 2);
                }
                check_low_rank_of($isa, [150, 131], 192);
            }

            /// A last panel of one row, of nine and of twelve: what lies behind it is read with it where panels have sixteen.
            #[test]
            fn products_of_a_short_last_panel_match_scalar() {
                for family in Family::all() {
                    for (m, groups) in [(241, 3), (99, 1), (57, 2)] {
                        check_product($isa, family, m, 17, groups, m == 241, m as u64);
                    }
                }
            }

            /// What more rows left in the buffers is nobody's.
            #[test]
            fn products_do_not_meet_what_earlier_rows_left_behind() {
                for family in Family::all() {
                    check_leftovers($isa, family, 3);
                }
            }

            /// Codes and activations of largest magnitude: no integer sum may saturate.
            #[test]
            fn extreme_codes_are_exact() {
                let Some((cpu, _)) = pair($isa) else { return };
                extreme_codes(cpu);
            }

            #[test]
            fn nothing_in_nothing_out() {
                let Some((cpu, _)) = pair($isa) else { return };
                for family in Family::all() {
                    assert!(product(cpu, &[], 0, &family.matrix($isa, 5, 256, 1), None).is_empty());
                    assert!(product(cpu, &[0.0; 256], 1, &family.matrix($isa, 0, 256, 1), None).is_empty());
                    for m in [2, 40] {
                        assert_eq!(product(cpu, &[], m, &family.matrix($isa, 3, 0, 1), None), vec![0.0; 3 * m]);
                    }
                }
                let nothing = Family::F32.matrix($isa, 0, 256, 1);
                assert!(gated(cpu, &[0.0; 256], 1, &gate_and_up(&nothing, &nothing, Activation::Silu)).is_empty());
                assert_eq!(cpu.max(&[]), f32::NEG_INFINITY);
            }
        })*
    };
}

properties! {
    scalar: Isa::Scalar;
    neon: Isa::Neon;
    neondot: Isa::NeonDot;
    neoni8mm: Isa::NeonI8mm;
    avx2: Isa::Avx2;
    avx512: Isa::Avx512;
    avxvnni: Isa::AvxVnni;
    avx512vnni: Isa::Avx512Vnni;
    amx: Isa::Amx;
}
