//! What the limits promise, by cases and against a naive twin.

use proptest::prelude::*;

use super::*;

fn tenant() -> Limited {
    Limited::Tenant(TenantId::new("acme").unwrap())
}

fn key(name: &str) -> Limited {
    Limited::Key(KeyId::new(name).unwrap())
}

fn limits(requests: u64, tokens: u64, concurrent: u32) -> RateLimits {
    RateLimits { requests_per_minute: Some(requests), tokens_per_minute: Some(tokens), concurrent: Some(concurrent) }
}

const NOW: UnixMillis = UnixMillis(1_700_000_000_000);

fn at(millis: u64) -> UnixMillis {
    NOW.after(Duration::from_millis(millis))
}

#[test]
fn a_refused_request_has_changed_nothing() {
    let limiter = Limiter::new();
    let under = [(tenant(), limits(100, 1000, 10)), (key("a"), limits(100, 50, 10))];
    let ask = |max_tokens| Ask { under: &under, max_tokens };
    let first = limiter.admit(&ask(40), NOW).unwrap();
    let refused = limiter.admit(&ask(20), NOW).err().unwrap();
    assert_eq!((refused.kind, &refused.whose, refused.limit), (LimitKind::Tokens, &key("a"), 50));
    assert_eq!(refused.retry_after, Some(Duration::from_secs(12)), "ten tokens at 50 a minute");
    let headers =
        |refused: &Refused| (refused.headers.requests.unwrap().remaining, refused.headers.tokens.unwrap().remaining);
    assert_eq!(headers(&refused), (99, 10), "the tightest of each, and only the first counted");
    assert_eq!(limiter.under_way(&tenant()), 1);
    let again = limiter.admit(&ask(20), NOW).err().unwrap();
    assert_eq!(headers(&again), (99, 10));
    drop(first);
    assert_eq!(limiter.under_way(&tenant()), 0);
}

#[test]
fn a_place_is_free_when_its_permit_drops() {
    let limiter = Limiter::new();
    let under = [(tenant(), RateLimits { concurrent: Some(2), ..RateLimits::default() })];
    let ask = Ask { under: &under, max_tokens: u64::MAX };
    let one = limiter.admit(&ask, NOW).unwrap();
    let _two = limiter.admit(&ask, NOW).unwrap();
    let refused = limiter.admit(&ask, NOW).err().unwrap();
    assert_eq!((refused.kind, refused.limit, refused.retry_after_seconds()), (LimitKind::Concurrent, 2, Some(1)));
    assert!(refused.to_string().contains("tenant acme has 2 requests under way"), "{refused}");
    drop(one);
    assert!(limiter.admit(&ask, NOW).is_ok());
}

#[test]
fn tokens_are_charged_by_the_bound_and_corrected_by_the_use() {
    let limiter = Limiter::new();
    let under = [(tenant(), limits(60, 600, 60))];
    let mut permit = limiter.admit(&Ask { under: &under, max_tokens: 500 }, NOW).unwrap();
    assert_eq!(permit.headers().tokens.unwrap().remaining, 100);
    permit.settle(80, NOW);
    let next = limiter.admit(&Ask { under: &under, max_tokens: 0 }, NOW).unwrap();
    assert_eq!(next.headers().tokens.unwrap().remaining, 520);
    permit.settle(700, NOW);
    let refused = limiter.admit(&Ask { under: &under, max_tokens: 1 }, NOW).err().unwrap();
    assert_eq!(
        refused.retry_after,
        Some(Duration::from_millis(10_100)),
        "a debt of 100 and one token, at ten a second"
    );
    assert_eq!(refused.retry_after_seconds(), Some(11), "whole seconds, none too few");
    assert!(limiter.admit(&Ask { under: &under, max_tokens: 1 }, at(10_100)).is_ok());
}

#[test]
fn what_never_fits_is_not_told_to_wait() {
    let limiter = Limiter::new();
    let under = [(tenant(), limits(60, 600, 60))];
    let refused = limiter.admit(&Ask { under: &under, max_tokens: 601 }, NOW).err().unwrap();
    assert_eq!((refused.retry_after, refused.retry_after_seconds()), (None, None));
    assert!(refused.to_string().contains("601") && refused.to_string().contains("max_tokens"), "{refused}");
}

#[test]
fn the_headers_are_openais() {
    let limiter = Limiter::new();
    let under = [(tenant(), limits(60, 600, 60))];
    let permit = limiter.admit(&Ask { under: &under, max_tokens: 90 }, NOW).unwrap();
    let expected = [
        ("x-ratelimit-limit-requests", "60"),
        ("x-ratelimit-remaining-requests", "59"),
        ("x-ratelimit-reset-requests", "1s"),
        ("x-ratelimit-limit-tokens", "600"),
        ("x-ratelimit-remaining-tokens", "510"),
        ("x-ratelimit-reset-tokens", "9s"),
    ];
    let got = permit.headers().pairs();
    assert_eq!(got.iter().map(|(name, value)| (*name, value.as_str())).collect::<Vec<_>>(), expected);
}

#[test]
fn idle_entries_are_swept_and_used_ones_stay() {
    let limiter = Limiter::new();
    let limited = RateLimits { requests_per_minute: Some(1), ..RateLimits::default() };
    let busy = [(tenant(), limited)];
    let _held = limiter.admit(&Ask { under: &busy, max_tokens: 0 }, NOW).unwrap();
    for index in 0..10_000u64 {
        let under = [(key(&index.to_string()), limited)];
        drop(limiter.admit(&Ask { under: &under, max_tokens: 0 }, at(index * 100)).unwrap());
    }
    // A minute's worth of keys is 600; the rest may wait for the next sweep.
    assert!(limiter.state().used.len() <= 2 * MIN_SWEEP, "{}", limiter.state().used.len());
    assert_eq!(limiter.under_way(&tenant()), 1);
}

#[test]
fn threads_never_share_a_place() {
    let limiter = Limiter::new();
    let most = std::sync::atomic::AtomicU32::new(0);
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                let under = [(tenant(), RateLimits { concurrent: Some(3), ..RateLimits::default() })];
                for _ in 0..2_000 {
                    if let Ok(_permit) = limiter.admit(&Ask { under: &under, max_tokens: 0 }, NOW) {
                        most.fetch_max(limiter.under_way(&tenant()), std::sync::atomic::Ordering::Relaxed);
                    }
                }
            });
        }
    });
    assert!((1..=3).contains(&most.into_inner()));
    assert_eq!(limiter.under_way(&tenant()), 0);
}

proptest! {
    /// Whatever comes when, no minute sees more than two minutes' worth start (what was there and what flowed in), and
    /// places add up.
    #[test]
    fn no_minute_sees_more_than_it_may(
        per_minute in 1..40u64, concurrent in 1..5u32, gaps in prop::collection::vec((0..4_000u64, 0..6usize), 1..200),
    ) {
        let limiter = Limiter::new();
        let limits = RateLimits { requests_per_minute: Some(per_minute), concurrent: Some(concurrent), tokens_per_minute: None };
        let under = [(tenant(), limits)];
        let (mut now, mut held, mut started) = (0, Vec::new(), Vec::new());
        for (gap, end) in gaps {
            now += gap;
            if end < held.len() {
                drop(held.swap_remove(end));
            }
            match limiter.admit(&Ask { under: &under, max_tokens: 0 }, at(now)) {
                Ok(permit) => {
                    held.push(permit);
                    started.push(now);
                }
                Err(refused) if refused.kind == LimitKind::Concurrent => prop_assert_eq!(held.len(), concurrent as usize),
                Err(_) => prop_assert!(!started.is_empty()),
            }
            prop_assert_eq!(limiter.under_way(&tenant()) as usize, held.len());
            for from in &started {
                let within = started.iter().filter(|start| (*from..=from + 60_000).contains(*start)).count();
                prop_assert!(within as u64 <= 2 * per_minute);
            }
        }
    }
}
