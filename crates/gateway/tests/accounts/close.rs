//! A store that is closed: what it had accepted is committed, what comes after is refused, and nobody waits for clones.

use bindery_gateway::{
    keys::{KeyError, KeyGrant, NewKey, table},
    store::StoreError,
};
use futures::FutureExt as _;

use crate::{on_every_store, support::*};

on_every_store! {
    async fn everything_that_was_accepted_is_committed(place) {
        let (store, thread) = place.open().await;
        let new = |index: usize| NewKey {
            tenant: tenant("acme"),
            name: index.to_string(),
            expires_at: None,
            grant: KeyGrant::default(),
        };
        // As many as may wait: each is asked once, and so handed over.
        let mut waiting = Vec::new();
        for index in 0..200 {
            // Not held back by the runtime, which lets a task do only so much at a time.
            let mut asked = Box::pin(tokio::task::unconstrained(table::create(&store, new(index), NOON)));
            match (&mut asked).now_or_never() {
                Some(answered) => drop(answered.unwrap()),
                None => waiting.push(asked),
            }
        }
        // A clone stays, as in a task that nobody ends.
        let clone = store.clone();
        store.close();
        tokio::task::spawn_blocking(|| thread.join()).await.unwrap();
        let late = table::create(&clone, new(201), NOON).await;
        assert!(matches!(late, Err(KeyError::Store(StoreError::Closed { .. }))), "{late:?}");
        assert_eq!(table::list(&clone).await.unwrap().len(), 200, "reading goes on, and sees all of them");
        let (again, _thread) = place.open().await;
        assert_eq!(table::list(&again).await.unwrap().len(), 200);
        // Whoever waited was told so, too.
        for asked in waiting {
            asked.await.unwrap();
        }
    }
}
