//! What an answer of the local model costs: the node's price an hour, for the time the request had of it.
//!
//! The engine shares each step's time out among the rows in it; a request's *measured use* is the sum of its shares, so
//! the uses of all requests add up to the time the node has worked, and their prices to what that time costs. Idle time
//! is nobody's.
//!
//! **Invariant**: the price of the parts is never below the price of the whole.

use std::time::Duration;

use crate::money::Money;

const NANOS_PER_HOUR: u128 = 3_600_000_000_000;

/// The price of `used` of a node that costs this an hour; `None` where it does not fit.
pub fn local_price(cost_per_hour: Money, used: Duration) -> Option<Money> {
    cost_per_hour.proportion(used.as_nanos(), NANOS_PER_HOUR)
}

/// One request's share of a step that ran `num_tokens` of its tokens among `num_all_tokens`.
pub fn share_of_step(step: Duration, num_tokens: u64, num_all_tokens: u64) -> Duration {
    if num_all_tokens == 0 {
        return Duration::ZERO;
    }
    let nanos = step.as_nanos().saturating_mul(u128::from(num_tokens)) / u128::from(num_all_tokens);
    Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn an_hour_costs_an_hour() {
        let cost = Money::from_dollars(2.10).unwrap();
        assert_eq!(local_price(cost, Duration::from_hours(1)), Some(cost));
        assert_eq!(
            local_price(cost, Duration::from_secs(1)),
            Some(Money::from_nanos(583_334)),
            "2.1 / 3600, rounded up"
        );
        assert_eq!(local_price(cost, Duration::ZERO), Some(Money::ZERO));
        assert_eq!(local_price(Money::MAX, Duration::MAX), None);
    }

    proptest! {
        #[test]
        fn shares_of_a_step_add_up_to_it(step in 1..10_000_000_000u64, rows in prop::collection::vec(0..4096u64, 1..64)) {
            let (step, all) = (Duration::from_nanos(step), rows.iter().sum::<u64>());
            let shared: Duration = rows.iter().map(|row| share_of_step(step, *row, all)).sum();
            prop_assert!(shared <= step);
            prop_assert!(all == 0 || step < shared + Duration::from_nanos(rows.len() as u64));
        }
    }
}
