//! The order in which a quantised matrix reads its inputs.
//!
//! Some quantisers give scales to groups of inputs that do not lie side by side (GPTQ orders them by activation). Such a
//! matrix is packed with its columns sorted by group, and its activations are brought into the same order before they become
//! int8. It must not know how either is stored. Its invariant: every input has one place, so reordering loses none.

use std::sync::Arc;

/// Which input stands at each place: a permutation, shared by the matrices that have it.
#[derive(Clone, Debug)]
pub struct InputOrder(Arc<[u32]>);

impl InputOrder {
    /// From the input at each place; none where some input is missing, and so another one twice.
    pub fn new(places: &[u32]) -> Option<Self> {
        let mut seen = vec![false; places.len()];
        for &input in places {
            *seen.get_mut(input as usize)? = true;
        }
        seen.into_iter().all(|seen| seen).then(|| Self(places.into()))
    }

    /// Inputs.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are no inputs.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The input at each place.
    pub fn places(&self) -> &[u32] {
        &self.0
    }
}

impl PartialEq for InputOrder {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0) || self.0 == other.0
    }
}

impl Eq for InputOrder {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_permutations_are_orders() {
        let order = InputOrder::new(&[2, 0, 1]).expect("a permutation");
        assert_eq!((order.places(), order.len(), order.is_empty()), (&[2, 0, 1][..], 3, false));
        assert_eq!(Some(order), InputOrder::new(&[2, 0, 1]));
        assert_eq!(InputOrder::new(&[2, 0, 2]), None);
        assert_eq!(InputOrder::new(&[1, 2, 3]), None);
        assert!(InputOrder::new(&[]).is_some_and(|order| order.is_empty()));
    }
}
