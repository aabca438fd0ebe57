//! API keys: made, refused, revoked and rotated, in this process and from another.

use std::time::Duration;

use bindery_gateway::{
    clock::UnixMillis,
    keys::{ApiKey, KeyError, KeyGrant, KeyRing, NewKey, RingOptions, Rotation, table},
    limits::RateLimits,
    names::KeyId,
    store::{Store, StoreError},
};

use crate::{on_every_store, support::*};

const RING: RingOptions = RingOptions { poll_every: Duration::from_millis(20), stale_after: Duration::from_secs(30) };

fn new(name: &str, expires_at: Option<UnixMillis>) -> NewKey {
    NewKey { tenant: tenant("acme"), name: name.to_owned(), expires_at, grant: KeyGrant::default() }
}

fn later(seconds: u64) -> UnixMillis {
    NOON.after(Duration::from_secs(seconds))
}

async fn ring(store: &Store) -> KeyRing {
    KeyRing::open(store.clone(), RING, NOON).await.unwrap()
}

on_every_store! {
    async fn keys_in_force_are_counted_by_tenant(place) {
        let (store, _thread) = place.open().await;
        let of = |name: &str, expires_at| NewKey { tenant: tenant(name), ..new("ci", expires_at) };
        for (name, expires_at) in [("acme", None), ("ghost", Some(later(60))), ("ghost", None), ("gone", None)] {
            let key = table::create(&store, of(name, expires_at), NOON).await.unwrap();
            if name == "gone" {
                table::revoke(&store, &key.id(), NOON).await.unwrap();
            }
        }
        let ring = ring(&store).await;
        let count = |now| ring.num_live_by_tenant(now).into_iter().collect::<Vec<_>>();
        assert_eq!(count(later(10)), [(tenant("acme"), 1), (tenant("ghost"), 2)]);
        assert_eq!(count(later(60)), [(tenant("acme"), 1), (tenant("ghost"), 1)]);
    }

    async fn a_key_opens_until_it_expires(place) {
        let (store, _thread) = place.open().await;
        let key = table::create(&store, new("ci", Some(later(60))), NOON).await.unwrap();
        let ring = ring(&store).await;
        let owner = ring.authenticate(key.expose(), later(10)).unwrap();
        assert_eq!((owner.tenant, owner.key), (tenant("acme"), key.id()));
        let ended = table::create(&store, new("ci", Some(NOON)), NOON).await;
        assert!(matches!(ended, Err(KeyError::EndsBeforeItBegins)));
        ring.refresh(later(60)).await.unwrap();
        assert!(ring.authenticate(key.expose(), UnixMillis(later(60).0 - 1)).is_ok());
        assert!(matches!(ring.authenticate(key.expose(), later(60)), Err(KeyError::Expired { .. })));
    }

    async fn nothing_but_the_key_itself_opens(place) {
        let (store, _thread) = place.open().await;
        let key = table::create(&store, new("ci", None), NOON).await.unwrap();
        let ring = ring(&store).await;
        let stranger = ApiKey::generate().unwrap();
        // The id of one key with the secret of another, its checksum made right.
        for wrong in ["", "bdy_", "sk-123", &key.expose()[..60], stranger.expose(), &key.expose().to_uppercase()] {
            assert!(matches!(ring.authenticate(wrong, NOON), Err(KeyError::Malformed | KeyError::Unknown)), "{wrong}");
        }
        let mixed = format!("{}{}", &key.expose()[..21], &stranger.expose()[21..]);
        assert!(matches!(ring.authenticate(&mixed, NOON), Err(KeyError::Malformed)), "the checksum covers both parts");
        // The store holds no key and nothing a key could be made of.
        let rows = place.ask("SELECT id, tenant, name, digest FROM api_keys").await;
        assert!(!format!("{rows:?}").contains(&key.expose()[21..53]));
        use sha2::Digest as _;
        let digest = sha2::Sha256::digest(key.expose().as_bytes());
        assert_eq!(rows[0][3], data_encoding::HEXLOWER.encode(&digest));
    }

    async fn a_revocation_by_another_process_acts_without_a_restart(place) {
        let (here, _here) = place.open().await;
        let (there, _there) = place.open().await;
        let key = table::create(&there, new("ci", None), NOON).await.unwrap();
        let ring = ring(&here).await;
        ring.watch();
        assert!(ring.authenticate(key.expose(), NOON).is_ok());
        let other = table::create(&there, new("late", None), NOON).await.unwrap();
        let at = table::revoke(&there, &key.id(), later(5)).await.unwrap();
        assert_eq!(at, later(5));
        assert_eq!(table::revoke(&there, &key.id(), later(9)).await.unwrap(), later(5), "once revoked, always since then");
        // The watcher finds both; how soon is its interval's business, not this test's.
        let now = UnixMillis::now();
        let found = async {
            while ring.authenticate(key.expose(), now).is_ok() || ring.authenticate(other.expose(), now).is_err() {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(Duration::from_mins(1), found).await.unwrap();
        assert!(matches!(ring.authenticate(key.expose(), now), Err(KeyError::Revoked { at, .. }) if at == later(5)));
        let nobody = KeyId::new("nobody").unwrap();
        assert!(matches!(table::revoke(&there, &nobody, NOON).await, Err(KeyError::NoSuchKey(id)) if id == nobody));
    }

    async fn a_rotated_key_and_its_successor_overlap(place) {
        let (store, _thread) = place.open().await;
        let old = table::create(&store, new("ci", None), NOON).await.unwrap();
        let rotation = |id: KeyId| Rotation { id, overlap: Duration::from_mins(1), expires_at: Some(later(1000)) };
        let fresh = table::rotate(&store, rotation(old.id()), NOON).await.unwrap();
        let ring = ring(&store).await;
        let opens = |key: &ApiKey, at| ring.authenticate(key.expose(), at).is_ok();
        assert!(opens(&old, later(20)) && opens(&fresh, later(20)));
        ring.refresh(later(60)).await.unwrap();
        assert!(!opens(&old, later(60)) && opens(&fresh, later(60)));
        ring.refresh(later(1000)).await.unwrap();
        assert!(!opens(&fresh, later(1000)));
        for id in [old.id(), KeyId::new("nobody").unwrap()] {
            let again = table::rotate(&store, rotation(id), NOON).await;
            assert!(matches!(again, Err(KeyError::NotRotatable(_) | KeyError::NoSuchKey(_))));
        }
        let listed = table::list(&store).await.unwrap();
        let of = |key: &ApiKey| listed.iter().find(|info| info.id == key.id().as_str()).unwrap();
        assert_eq!(of(&old).successor.as_deref(), Some(fresh.id().as_str()));
        assert_eq!((of(&fresh).tenant.as_str(), of(&fresh).name.as_str()), ("acme", "ci"));
        assert_eq!(of(&old).expires_at, Some(later(60).0));
    }

    async fn what_a_key_may_use_is_kept_with_it_and_by_its_successor(place) {
        let (store, _thread) = place.open().await;
        let grant = KeyGrant {
            limits: RateLimits { requests_per_minute: Some(u64::MAX), tokens_per_minute: Some(7), concurrent: Some(2) },
            models: Some(vec!["base".to_owned(), "a, \"b\"*".to_owned()]),
            adapters: Some(vec!["fr".to_owned()]),
        };
        let old = table::create(&store, NewKey { grant: grant.clone(), ..new("ci", None) }, NOON).await.unwrap();
        let plain = table::create(&store, new("plain", None), NOON).await.unwrap();
        let rotation = Rotation { id: old.id(), overlap: Duration::from_mins(1), expires_at: None };
        let fresh = table::rotate(&store, rotation, NOON).await.unwrap();
        // No number of the store is so large: the largest there is stands for it.
        let kept = KeyGrant {
            limits: RateLimits { requests_per_minute: Some(i64::MAX as u64), ..grant.limits },
            ..grant.clone()
        };
        let ring = ring(&store).await;
        for (key, kept) in [(&old, &kept), (&fresh, &kept), (&plain, &KeyGrant::default())] {
            assert_eq!(*ring.authenticate(key.expose(), NOON).unwrap().grant, *kept);
            let listed = table::list(&store).await.unwrap();
            assert_eq!(listed.iter().find(|info| info.id == key.id().as_str()).unwrap().grant.as_ref(), Some(kept));
        }
        let empty = KeyGrant { models: Some(Vec::new()), ..KeyGrant::default() };
        let refused = table::create(&store, NewKey { grant: empty, ..new("ci", None) }, NOON).await;
        assert!(matches!(refused, Err(KeyError::BadList { what: "models", count: 0 })));
    }

    /// Otherwise a list that was made unreadable would be a list that allows everything.
    async fn a_key_whose_lists_cannot_be_read_opens_nothing(place) {
        let (store, _thread) = place.open().await;
        let key = table::create(&store, new("ci", None), NOON).await.unwrap();
        place.ask("UPDATE api_keys SET models = 'everything', changed = changed + 1").await;
        place.ask("UPDATE changes SET counter = counter + 1").await;
        let ring = ring(&store).await;
        assert!(matches!(ring.authenticate(key.expose(), NOON), Err(KeyError::Unknown)));
        assert_eq!(table::list(&store).await.unwrap()[0].grant, None);
    }

    /// More than one page of changes, some of them in one transaction.
    async fn a_ring_misses_no_change(place) {
        let (store, _thread) = place.open().await;
        let ring = ring(&store).await;
        let make = |index: usize| {
            let store = store.clone();
            tokio::spawn(async move { table::create(&store, new(&index.to_string(), None), NOON).await.unwrap() })
        };
        let keys: Vec<_> = futures::future::join_all((0..600).map(make)).await.into_iter().map(Result::unwrap).collect();
        for key in keys.iter().step_by(7) {
            table::revoke(&store, &key.id(), NOON).await.unwrap();
        }
        ring.refresh(NOON).await.unwrap();
        for (index, key) in keys.iter().enumerate() {
            assert_eq!(ring.authenticate(key.expose(), NOON).is_ok(), index % 7 != 0);
        }
    }
}

#[tokio::test]
async fn keys_that_were_not_read_for_too_long_open_nothing() {
    let place = Place::sqlite();
    let (store, _thread) = place.open().await;
    let key = table::create(&store, new("ci", None), NOON).await.unwrap();
    let ring = ring(&store).await;
    assert!(ring.authenticate(key.expose(), later(30)).is_ok());
    let stale = ring.authenticate(key.expose(), later(31)).unwrap_err();
    assert!(matches!(stale, KeyError::Stale { .. }) && stale.to_string().contains("30s"), "{stale}");
    ring.refresh(later(31)).await.unwrap();
    assert!(ring.authenticate(key.expose(), later(31)).is_ok());
}

/// Another program holds the file for longer than anybody waits.
#[tokio::test]
async fn a_store_that_does_not_answer_makes_no_keys_and_keeps_those_known() {
    let place = Place::sqlite();
    let mut options = place.options();
    options.timeout = Duration::from_millis(200);
    let (store, _thread) = Store::open(options).await.unwrap();
    let key = table::create(&store, new("ci", None), NOON).await.unwrap();
    let ring = ring(&store).await;
    let mut other = <sqlx::AnyConnection as sqlx::Connection>::connect(&place.url).await.unwrap();
    sqlx::raw_sql("BEGIN IMMEDIATE").execute(&mut other).await.unwrap();
    let error = table::create(&store, new("late", None), NOON).await.unwrap_err();
    assert!(matches!(&error, KeyError::Store(error @ StoreError::Busy { .. }) if error.is_transient()), "{error:?}");
    assert!(ring.authenticate(key.expose(), NOON).is_ok());
    ring.refresh(NOON).await.unwrap();
    sqlx::raw_sql("ROLLBACK").execute(&mut other).await.unwrap();
    // It may be a moment until the writer asks again.
    let made = async { while table::create(&store, new("later", None), NOON).await.is_err() {} };
    tokio::time::timeout(Duration::from_mins(1), made).await.unwrap();
}

/// A server that was restarted, or a network that was away for a moment.
#[tokio::test]
async fn a_lost_connection_is_made_anew_without_anyone_noticing() {
    let Some(place) = Place::postgres().await else { return };
    let (store, _thread) = place.open().await;
    for index in 0..5 {
        let key = table::create(&store, new(&index.to_string(), None), NOON).await.unwrap();
        let killed = "SELECT CAST(COUNT(pg_terminate_backend(pid)) AS BIGINT) FROM pg_stat_activity \
                      WHERE application_name = 'bindery' AND datname = current_database()";
        assert_ne!(place.ask(killed).await, [["0"]]);
        table::revoke(&store, &key.id(), NOON).await.unwrap();
    }
    let listed = table::list(&store).await.unwrap();
    assert_eq!(listed.iter().filter(|info| info.revoked_at.is_some()).count(), 5);
}
