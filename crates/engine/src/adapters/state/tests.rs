//! The pool's rules, one by one, and a random walk against what the model thread would see.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::testing::fake_adapter_info;

const NAMES: [&str; 6] = ["a", "b", "c", "d", "e", "f"];

fn spec(name: &str, pinned: bool) -> AdapterSpec {
    let source = crate::adapters::AdapterSource::Path(name.into());
    AdapterSpec { name: name.to_owned(), source, tenants: None, pinned }
}

fn adapter() -> Arc<Adapter> {
    Arc::new(Adapter::without_weights(fake_adapter_info(), 1))
}

fn who(name: &str) -> Arc<str> {
    name.into()
}

/// Of a request that came just now.
fn ask(state: &mut State, name: &str, who: Option<&Arc<str>>, since: Option<u64>, now: Instant) -> Next {
    let ticket = state.ticket();
    state.acquire(&Asking { name, who, ticket, since, now })
}

/// For whoever runs the server, who does not wait.
fn begin_reading(state: &mut State, name: &str) -> Result<Option<u64>, AdapterError> {
    let ticket = state.ticket();
    let begun = state.begin_reading(name, ticket);
    state.break_promise(ticket);
    begun
}

/// Reads whatever has to be read and gives the version in use, or None where it has to wait.
fn acquire(state: &mut State, name: &str, owner: Option<&Arc<str>>) -> Option<u32> {
    let now = Instant::now();
    loop {
        match ask(state, name, owner, None, now) {
            Next::Use(id) => return Some(id),
            Next::Read { attempt } => state.end_reading(name, attempt, Ok((adapter(), String::new())), now),
            Next::Wait(_) => return None,
            Next::Fail(error) => panic!("{error}"),
        }
    }
}

fn with_names(max_loras: usize, max_cpu_loras: usize) -> State {
    let mut state = State::new(max_loras, max_cpu_loras);
    for name in NAMES {
        state.register(spec(name, false)).unwrap();
    }
    state
}

fn residents(state: &State) -> Vec<&str> {
    let residents = state.versions.values().filter(|version| version.is_resident);
    let mut names: Vec<&str> = residents.map(|version| version.name.as_str()).collect();
    names.sort_unstable();
    names
}

/// Found where a load in place without a word of tenants opened a tenant's adapter to everybody.
#[test]
fn what_is_replaced_stays_with_its_tenants_and_stays_pinned() {
    let mut state = State::new(2, 4);
    let of = |tenants: &[&str], pinned| AdapterSpec {
        tenants: (!tenants.is_empty()).then(|| tenants.iter().map(|&name| name.to_owned()).collect()),
        ..spec("a", pinned)
    };
    let mut place = |spec: AdapterSpec| {
        let ticket = state.ticket();
        assert!(state.place(&spec, true, (adapter(), String::new()), ticket).unwrap());
        let spec = state.spec("a").unwrap();
        (spec.tenants.clone().unwrap_or_default(), spec.pinned)
    };
    assert_eq!(place(of(&["acme"], true)), (vec!["acme".to_owned()], true));
    assert_eq!(place(of(&[], false)), (vec!["acme".to_owned()], true), "nothing was said of either");
    assert_eq!(place(of(&["rival"], false)), (vec!["rival".to_owned()], true));
}

/// Requests that follow each other without a pause kept every load waiting.
#[test]
fn a_load_gets_a_place_beside_requests_that_never_pause() {
    let mut state = with_names(2, 2);
    let a = acquire(&mut state, "a", None).unwrap();
    let b = acquire(&mut state, "b", None).unwrap();
    let ticket = state.ticket();
    let place = |state: &mut State| state.place(&spec("b", false), true, (adapter(), String::new()), ticket).unwrap();
    assert!(!place(&mut state), "both places are in use");
    // Another request for each, before the first ones end.
    let next_b = acquire(&mut state, "b", None).expect("it is what is loaded");
    assert_eq!(acquire(&mut state, "a", None), None, "its place is promised");
    state.release(b, false);
    assert!(!place(&mut state));
    state.release(a, false);
    assert!(place(&mut state));
    state.break_promise(ticket);
    let new = acquire(&mut state, "b", None).unwrap();
    assert!(new != next_b, "who asks now gets the new version");
    state.release(next_b, false);
    assert!(acquire(&mut state, "a", None).is_some(), "the old version has made room");
}

#[test]
fn the_one_unused_for_longest_gives_way_and_a_used_one_never() {
    let mut state = with_names(2, 4);
    let a = acquire(&mut state, "a", None).unwrap();
    let b = acquire(&mut state, "b", None).unwrap();
    assert_eq!(acquire(&mut state, "c", None), None, "both places are in use");
    // It goes away, and what was promised to it with it.
    state.break_promise(state.next_ticket);
    state.release(a, false);
    state.release(b, false);
    let a = acquire(&mut state, "a", None).unwrap();
    state.release(a, false);
    acquire(&mut state, "c", None).unwrap();
    assert_eq!(residents(&state), ["a", "c"]);
    assert!(state.is_in_memory("b"), "it is still in memory");
    acquire(&mut state, "d", None).unwrap();
    acquire(&mut state, "d", None).unwrap();
    assert_eq!(residents(&state), ["c", "d"]);
    assert_eq!(acquire(&mut state, "e", None), None);
    assert!(!state.is_in_memory("b"), "five in memory are one too many");
    state.orders();
}

#[test]
fn a_tenant_pushes_nobody_out_of_its_share() {
    let mut state = with_names(4, 6);
    let (x, y) = (who("x"), who("y"));
    for name in ["a", "b", "c", "d"] {
        let id = acquire(&mut state, name, Some(&x)).unwrap();
        state.release(id, false);
    }
    assert_eq!(residents(&state), ["a", "b", "c", "d"], "alone, all places are its own");
    for name in ["e", "f"] {
        let id = acquire(&mut state, name, Some(&y)).unwrap();
        state.release(id, false);
    }
    assert_eq!(residents(&state), ["c", "d", "e", "f"], "two each");
    let id = acquire(&mut state, "a", Some(&y)).unwrap();
    assert_eq!(residents(&state), ["a", "c", "d", "f"], "a third one takes the place of its own oldest");
    state.release(id, false);
    let z = who("z");
    let id = acquire(&mut state, "b", Some(&z)).unwrap();
    assert_eq!(
        residents(&state),
        ["a", "b", "d", "f"],
        "a third tenant: shares of one, the oldest of those above it goes"
    );
    state.release(id, false);
    state.orders();
}

#[test]
fn who_has_nothing_finds_a_place_also_where_all_keep_to_their_shares() {
    let mut state = with_names(2, 6);
    for (name, owner) in [("a", "x"), ("b", "y"), ("c", "z")] {
        let id = acquire(&mut state, name, Some(&who(owner))).unwrap();
        state.release(id, false);
    }
    assert_eq!(residents(&state), ["b", "c"]);
    state.orders();
}

#[test]
fn a_new_version_takes_the_name_and_the_old_one_stays_with_its_users() {
    let mut state = with_names(1, 3);
    let old = acquire(&mut state, "a", None).unwrap();
    let attempt = begin_reading(&mut state, "a").unwrap().unwrap();
    state.end_reading("a", attempt, Ok((adapter(), String::new())), Instant::now());
    let new = acquire(&mut state, "a", None).unwrap();
    assert_ne!(old, new);
    let states: Vec<(u32, AdapterState)> =
        state.list().iter().filter(|status| status.name == "a").map(|status| (status.version, status.state)).collect();
    assert_eq!(states, [(2, AdapterState::Resident), (1, AdapterState::Draining)]);
    state.release(old, false);
    let removed = state.orders().iter().any(|order| matches!(order, Order::Remove(id) if *id == old));
    assert!(removed && state.versions.len() == 1);
    state.release(new, false);
}

#[test]
fn a_failure_is_told_to_who_waited_and_tried_again_later() {
    let mut state = with_names(1, 2);
    let now = Instant::now();
    let Next::Read { attempt } = ask(&mut state, "a", None, None, now) else { panic!("it has to be read") };
    assert!(matches!(ask(&mut state, "a", None, None, now), Next::Wait(Some(waited)) if waited == attempt));
    state.end_reading("a", attempt, Err("torn".to_owned()), now);
    let told = |next| matches!(next, Next::Fail(AdapterError::Unreadable { reason, .. }) if reason == "torn");
    assert!(told(ask(&mut state, "a", None, Some(attempt), now + RETRY_AFTER)));
    assert!(told(ask(&mut state, "a", None, None, now)), "not at once again");
    assert!(matches!(ask(&mut state, "a", None, None, now + RETRY_AFTER), Next::Read { .. }));
    assert!(matches!(ask(&mut state, "nobody", None, None, now), Next::Fail(AdapterError::Unknown { .. })));
    state.orders();
}

#[test]
fn pinned_ones_stay_and_are_no_more_than_fit() {
    let mut state = State::new(1, 1);
    state.register(spec("p", true)).unwrap();
    let error = state.register(spec("q", true)).unwrap_err().to_string();
    assert!(error.contains("--max-loras"), "{error}");
    state.register(spec("a", false)).unwrap();
    state.check_pins(&spec("p", true)).unwrap();
    state.check_pins(&spec("a", true)).unwrap_err();
    let attempt = begin_reading(&mut state, "p").unwrap().unwrap();
    state.end_reading("p", attempt, Ok((adapter(), String::new())), Instant::now());
    state.pin("p");
    assert_eq!(residents(&state), ["p"]);
    let Next::Fail(error) = ask(&mut state, "a", None, None, Instant::now()) else { panic!("there is no room") };
    assert!(error.to_string().contains("--max-cpu-loras"), "{error}");
    state.orders();
}

#[test]
fn where_all_places_are_pinned_nobody_waits_for_one() {
    let mut state = State::new(1, 2);
    state.register(spec("p", true)).unwrap();
    state.register(spec("a", false)).unwrap();
    let attempt = begin_reading(&mut state, "p").unwrap().unwrap();
    state.end_reading("p", attempt, Ok((adapter(), String::new())), Instant::now());
    state.pin("p");
    let now = Instant::now();
    let Next::Read { attempt } = ask(&mut state, "a", None, None, now) else { panic!("there is room in memory") };
    state.end_reading("a", attempt, Ok((adapter(), String::new())), now);
    let Next::Fail(error) = ask(&mut state, "a", None, None, now) else { panic!("no place will ever be free") };
    assert!(matches!(error, AdapterError::NoRoom { .. }) && error.to_string().contains("--max-loras"), "{error}");
    // Nor is anything loaded that could never be used; a new version of what is pinned can be.
    let mut place = |name: &str| {
        let ticket = state.ticket();
        state.place(&spec(name, false), true, (adapter(), String::new()), ticket)
    };
    for name in ["a", "new"] {
        assert_eq!(place(name), Err(error.clone()));
    }
    assert_eq!(place("p"), Ok(true));
    assert!(state.spec("new").is_none());
    state.orders();
}

/// Two versions of one number could not be told apart in a listing.
#[test]
fn versions_are_numbered_on_where_a_name_comes_back_beside_old_users() {
    let mut state = with_names(2, 4);
    let numbers = |state: &State| {
        let of_a = state.list().into_iter().filter(|status| status.name == "a");
        of_a.map(|status| (status.version, status.num_users)).collect::<Vec<_>>()
    };
    let old = acquire(&mut state, "a", None).unwrap();
    state.forget("a").unwrap();
    state.register(spec("a", false)).unwrap();
    acquire(&mut state, "a", None).unwrap();
    assert_eq!(numbers(&state), [(2, 1), (1, 1)]);
    state.release(old, false);
    assert_eq!(numbers(&state), [(2, 1)]);
}

#[test]
fn a_name_that_now_belongs_to_others_is_unknown_to_who_waited_for_it() {
    let mut state = State::new(1, 1);
    let (x, y) = (who("x"), who("y"));
    state.register(spec("a", false)).unwrap();
    let now = Instant::now();
    let Next::Read { attempt } = ask(&mut state, "a", Some(&x), None, now) else { panic!("it has to be read") };
    // Taken away and given to another tenant before who waited has looked again.
    state.forget("a").unwrap();
    state.end_reading("a", attempt, Ok((adapter(), String::new())), now);
    state.register(AdapterSpec { tenants: Some(vec!["y".to_owned()]), ..spec("a", false) }).unwrap();
    for stranger in [Some(&x), None] {
        let next = ask(&mut state, "a", stranger, Some(attempt), now);
        assert!(matches!(next, Next::Fail(AdapterError::Unknown { .. })), "{next:?}");
    }
    assert!(acquire(&mut state, "a", Some(&y)).is_some());
    state.orders();
}

/// One adapter is never out of use, and a request for another comes all the same to its turn; so do those after it.
#[test]
fn who_waits_for_a_place_gets_it_though_others_keep_all_places_busy() {
    for max_cpu_loras in [1, 2] {
        let mut state = with_names(1, max_cpu_loras);
        let now = Instant::now();
        let first = acquire(&mut state, "a", None).unwrap();
        let second = acquire(&mut state, "a", None).unwrap();
        // What "b" asks as often as something changes.
        let (early, late) = (state.ticket(), state.ticket());
        let again = |state: &mut State, ticket: u64| loop {
            match state.acquire(&Asking { name: "b", who: None, ticket, since: None, now }) {
                Next::Read { attempt } => state.end_reading("b", attempt, Ok((adapter(), String::new())), now),
                next => return next,
            }
        };
        for ticket in [early, late] {
            assert!(matches!(again(&mut state, ticket), Next::Wait(_)));
            assert!(state.try_wait("b", ticket, 9));
        }
        state.release(first, false);
        assert_eq!(acquire(&mut state, "a", None), None, "its place is promised now");
        state.release(second, false);
        let newcomer = state.ticket();
        let steal = state.acquire(&Asking { name: "c", who: None, ticket: newcomer, since: None, now });
        if let Next::Read { attempt } = steal {
            state.end_reading("c", attempt, Ok((adapter(), String::new())), now);
        }
        let stolen = state.acquire(&Asking { name: "c", who: None, ticket: newcomer, since: None, now });
        assert!(matches!(stolen, Next::Wait(_)), "nor does a third one get it: {stolen:?}");
        state.break_promise(newcomer);
        let Next::Use(b) = again(&mut state, early) else { panic!("{max_cpu_loras}: it was promised") };
        state.end_wait("b", early);
        assert!(matches!(again(&mut state, late), Next::Use(_)), "those who wait for the same go in together");
        state.end_wait("b", late);
        // The one that waits goes away: the place is for everybody again.
        let gone = state.ticket();
        assert!(matches!(
            state.acquire(&Asking { name: "a", who: None, ticket: gone, since: None, now }),
            Next::Wait(_)
        ));
        assert_eq!(acquire(&mut state, "b", None), None);
        state.break_promise(gone);
        assert_eq!(acquire(&mut state, "b", None), Some(b));
        state.orders();
    }
}

/// Whoever is quicker to ask again, the one that came first has the place first: in batches and in memory.
#[test]
fn places_are_had_in_the_order_in_which_requests_came() {
    for max_cpu_loras in [1, 2, 3] {
        let mut state = with_names(1, max_cpu_loras);
        let now = Instant::now();
        let mut in_use = acquire(&mut state, "a", None).unwrap();
        let mut waiting: Vec<(&str, u64)> =
            ["b", "c", "a", "d", "b", "c"].into_iter().map(|name| (name, state.ticket())).collect();
        let mut had = Vec::new();
        for &(name, ticket) in &waiting {
            assert!(state.try_wait(name, ticket, 9));
        }
        while !waiting.is_empty() {
            // Those who came last ask first, until nothing moves; what is in use ends only then.
            let mut moves = true;
            while std::mem::take(&mut moves) {
                for &(name, ticket) in waiting.clone().iter().rev() {
                    match state.acquire(&Asking { name, who: None, ticket, since: None, now }) {
                        Next::Read { attempt } => {
                            state.end_reading(name, attempt, Ok((adapter(), String::new())), now);
                            moves = true;
                        }
                        Next::Use(id) => {
                            state.end_wait(name, ticket);
                            waiting.retain(|&(_, other)| other != ticket);
                            had.push(name);
                            state.release(std::mem::replace(&mut in_use, id), false);
                            moves = true;
                        }
                        Next::Wait(_) => {}
                        Next::Fail(error) => panic!("{error}"),
                    }
                }
            }
            state.orders();
            if !waiting.is_empty() {
                state.release(in_use, false);
                in_use = loop {
                    let &(name, ticket) = waiting.first().unwrap();
                    match state.acquire(&Asking { name, who: None, ticket, since: None, now }) {
                        Next::Use(id) => {
                            state.end_wait(name, ticket);
                            waiting.remove(0);
                            had.push(name);
                            break id;
                        }
                        Next::Read { attempt } => {
                            state.end_reading(name, attempt, Ok((adapter(), String::new())), now);
                        }
                        next => panic!("{max_cpu_loras}: {name} came first, and after {had:?} it is to {next:?}"),
                    }
                };
            }
        }
    }
}

#[test]
fn a_place_within_its_share_is_promised_to_nobody_else() {
    let mut state = with_names(2, 6);
    let (x, y) = (who("x"), who("y"));
    let a = acquire(&mut state, "a", Some(&x)).unwrap();
    acquire(&mut state, "b", Some(&y)).unwrap();
    assert_eq!(acquire(&mut state, "c", Some(&y)), None, "it waits for its own");
    assert_eq!(acquire(&mut state, "a", Some(&x)), Some(a), "the other goes on");
    assert_eq!(acquire(&mut state, "b", Some(&y)), None);
    state.orders();
}

#[test]
fn nobody_is_pushed_out_of_memory_below_its_share_either() {
    let (x, y) = (who("x"), who("y"));
    let use_once = |state: &mut State, name: &str, owner: &Arc<str>| {
        let id = acquire(state, name, Some(owner)).unwrap();
        state.release(id, false);
    };
    // As many places in memory as in batches, and more.
    for (max_loras, max_cpu_loras) in [(2, 2), (1, 4), (2, 4)] {
        let mut state = with_names(max_loras, max_cpu_loras);
        use_once(&mut state, "a", &x);
        for name in ["b", "c", "d", "e", "f"] {
            use_once(&mut state, name, &y);
            assert!(state.is_in_memory("a"), "{max_loras} of {max_cpu_loras}: {name} pushed it out");
        }
        state.orders();
    }
}

#[test]
fn pinned_ones_count_to_nobodys_share() {
    let mut state = State::new(2, 4);
    state.register(spec("p", true)).unwrap();
    for name in ["a", "b"] {
        state.register(spec(name, false)).unwrap();
    }
    let attempt = begin_reading(&mut state, "p").unwrap().unwrap();
    state.end_reading("p", attempt, Ok((adapter(), String::new())), Instant::now());
    state.pin("p");
    let id = acquire(&mut state, "a", Some(&who("x"))).unwrap();
    state.release(id, false);
    // One who belongs to no tenant, as whoever pinned: it has nothing, so it may have the only place there is.
    assert!(acquire(&mut state, "b", None).is_some());
    assert_eq!(residents(&state), ["b", "p"]);
    state.orders();
}

#[derive(Clone, Debug)]
enum Step {
    Acquire(usize, usize),
    Release(usize),
    EndReading(usize, bool),
    Refresh(usize),
    Forget(usize),
    Register(usize, bool),
}

fn step() -> impl Strategy<Value = Step> {
    let name = 0..NAMES.len();
    prop_oneof![
        6 => (name.clone(), 0..4_usize).prop_map(|(name, who)| Step::Acquire(name, who)),
        4 => any::<prop::sample::Index>().prop_map(|at| Step::Release(at.index(1 << 16))),
        4 => (any::<prop::sample::Index>(), prop::bool::weighted(0.8))
            .prop_map(|(at, good)| Step::EndReading(at.index(1 << 16), good)),
        1 => name.clone().prop_map(Step::Refresh),
        1 => name.clone().prop_map(Step::Forget),
        1 => (name, any::<bool>()).prop_map(|(name, pinned)| Step::Register(name, pinned)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    /// Against what the model thread would see: it knows a version as long as somebody uses it, and no longer than it is
    /// in memory. The rest is asserted by `check` after every step.
    #[test]
    fn the_model_thread_knows_what_is_used(
        max_loras in 1..4_usize, more in 0..3_usize, steps in prop::collection::vec(step(), 1..120),
    ) {
        let mut state = State::new(max_loras, max_loras + more);
        let owners: Vec<Option<Arc<str>>> = vec![None, Some(who("x")), Some(who("y")), Some(who("z"))];
        let mut in_model: BTreeMap<u32, usize> = BTreeMap::new();
        let (mut used, mut reading): (Vec<u32>, Vec<(String, u64)>) = (Vec::new(), Vec::new());
        let mut now = Instant::now();
        for step in steps {
            now += Duration::from_secs(1);
            match step {
                Step::Acquire(name, owner) => match ask(&mut state, NAMES[name], owners[owner].as_ref(), None, now) {
                    Next::Use(id) => used.push(id),
                    Next::Read { attempt } => reading.push((NAMES[name].to_owned(), attempt)),
                    // It goes away, unless it keeps a place promised.
                    Next::Wait(_) if owner > 0 => state.break_promise(state.next_ticket),
                    Next::Wait(_) | Next::Fail(_) => {}
                },
                Step::Release(at) if !used.is_empty() => {
                    let id = used.swap_remove(at % used.len());
                    state.release(id, false);
                }
                Step::EndReading(at, good) if !reading.is_empty() => {
                    let (name, attempt) = reading.swap_remove(at % reading.len());
                    let result = if good { Ok((adapter(), String::new())) } else { Err("bad".to_owned()) };
                    state.end_reading(&name, attempt, result, now);
                    state.pin(&name);
                }
                Step::Refresh(name) => {
                    if let Ok(Some(attempt)) = begin_reading(&mut state, NAMES[name]) {
                        reading.push((NAMES[name].to_owned(), attempt));
                    }
                }
                Step::Forget(name) => {
                    let _unknown = state.forget(NAMES[name]);
                }
                Step::Register(name, pinned) => {
                    let _exists = state.register(spec(NAMES[name], pinned));
                }
                Step::Release(_) | Step::EndReading(..) => {}
            }
            for order in state.orders() {
                match order {
                    Order::Add(id, _) => prop_assert!(in_model.insert(id, 0).is_none(), "{id} is added twice"),
                    Order::Remove(id) => {
                        prop_assert!(in_model.remove(&id).is_some(), "{id} was not there");
                        prop_assert!(!used.contains(&id), "{id} is in use");
                    }
                }
            }
            for id in &used {
                prop_assert!(in_model.contains_key(id), "{id} is used and the model does not know it");
            }
        }
        for id in used.drain(..) {
            state.release(id, false);
        }
        for (name, attempt) in reading.drain(..) {
            state.end_reading(&name, attempt, Err("late".to_owned()), now);
        }
        for name in NAMES {
            let _unknown = state.forget(name);
        }
        state.orders();
        prop_assert!(state.versions.is_empty() && state.num_reading == 0, "nothing is left");
    }
}
