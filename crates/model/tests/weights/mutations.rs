//! What is done to bytes before a reader gets them, for the fuzz tests of weights and of adapters.
//!
//! Knows bytes only.

use proptest::prelude::*;

/// Replace some bytes, cut, or put some in.
#[derive(Clone, Debug)]
pub(crate) enum Mutation {
    Set(prop::sample::Index, u8),
    Cut(prop::sample::Index),
    Insert(prop::sample::Index, Vec<u8>),
    /// A count, length or offset of some width becomes a special value.
    Number(prop::sample::Index, u64, usize),
}

/// Any of them.
pub(crate) fn mutation() -> impl Strategy<Value = Mutation> {
    let special = prop_oneof![
        Just(0),
        Just(1),
        Just(u64::MAX),
        Just(i64::MAX as u64),
        Just(1 << 32),
        Just((1 << 32) - 1),
        Just(1 << 40),
        0u64..4096
    ];
    prop_oneof![
        4 => (any::<prop::sample::Index>(), any::<u8>()).prop_map(|(at, byte)| Mutation::Set(at, byte)),
        1 => any::<prop::sample::Index>().prop_map(Mutation::Cut),
        1 => (any::<prop::sample::Index>(), prop::collection::vec(any::<u8>(), 1..9))
            .prop_map(|(at, bytes)| Mutation::Insert(at, bytes)),
        3 => (any::<prop::sample::Index>(), special, prop_oneof![Just(1usize), Just(4), Just(8)])
            .prop_map(|(at, value, width)| Mutation::Number(at, value, width)),
    ]
}

/// Headers are where mutations bite: positions fall into the first `head` bytes mostly.
pub(crate) fn mutate(mut bytes: Vec<u8>, head: usize, mutations: &[Mutation]) -> Vec<u8> {
    for (i, mutation) in mutations.iter().enumerate() {
        if bytes.is_empty() {
            break;
        }
        let reach = if i % 4 == 3 { bytes.len() } else { head.min(bytes.len()) };
        match mutation {
            Mutation::Set(at, byte) => bytes[at.index(reach)] = *byte,
            Mutation::Cut(at) => bytes.truncate(at.index(bytes.len())),
            Mutation::Insert(at, new) => {
                let at = at.index(reach);
                bytes.splice(at..at, new.iter().copied());
            }
            Mutation::Number(at, value, width) => {
                let at = at.index(reach);
                for (byte, new) in bytes[at..].iter_mut().zip(&value.to_le_bytes()[..*width]) {
                    *byte = *new;
                }
            }
        }
    }
    bytes
}
