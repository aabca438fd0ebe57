//! Stores that cannot be used: each error names the store and the next step.

use std::str::FromStr as _;

use bindery_gateway::{
    clock::UnixMillis,
    keys::{KeyError, KeyGrant, NewKey, table},
    store::{Store, StoreError, StoreUrl},
};

use crate::support::*;

async fn refused(url: &str) -> StoreError {
    let error = Store::open(options(url)).await.err().unwrap();
    assert!(error.to_string().contains(url.split('?').next().unwrap()), "{error} does not name {url}");
    assert!(!error.hint().is_empty());
    error
}

async fn with_tables(place: &Place, sql: &'static str) {
    let (store, thread) = place.open().await;
    drop(store);
    tokio::task::spawn_blocking(|| thread.join()).await.unwrap();
    let mut connection = <sqlx::AnyConnection as sqlx::Connection>::connect(&place.url).await.unwrap();
    sqlx::raw_sql(sql).execute(&mut connection).await.unwrap();
}

#[tokio::test]
async fn a_newer_schema_is_refused_by_name() {
    let place = Place::sqlite();
    with_tables(&place, "INSERT INTO bindery_schema (version, name, applied_at) VALUES (99, 'quotas', 0)").await;
    let error = refused(&place.url).await;
    assert!(matches!(&error, StoreError::NewerSchema { found: 99, name, known: 6, .. } if name == "quotas"), "{error}");
    assert!(error.hint().contains("newer"));
}

#[tokio::test]
async fn a_newer_schema_is_refused_by_name_on_postgres() {
    if let Some(place) = Place::postgres().await {
        with_tables(&place, "INSERT INTO bindery_schema (version, name, applied_at) VALUES (99, 'quotas', 0)").await;
        assert!(matches!(Store::open(place.options()).await, Err(StoreError::NewerSchema { found: 99, .. })));
    }
}

#[tokio::test]
async fn a_file_that_is_no_database_is_left_alone() {
    let place = Place::sqlite();
    let text = "this is somebody's letter, and long enough to be looked at as a database ".repeat(20);
    std::fs::write(place.path(), &text).unwrap();
    assert!(matches!(refused(&place.url).await, StoreError::Corrupt { .. }));
    assert_eq!(std::fs::read_to_string(place.path()).unwrap(), text);
}

#[tokio::test]
async fn a_damaged_file_is_refused() {
    let place = Place::sqlite();
    with_tables(&place, "PRAGMA wal_checkpoint(TRUNCATE)").await;
    let mut bytes = std::fs::read(place.path()).unwrap();
    // The first page keeps its header of 100 bytes, so it is a database, and its table of tables is not.
    bytes[100..4096].fill(0xa5);
    std::fs::write(place.path(), bytes).unwrap();
    assert!(matches!(refused(&place.url).await, StoreError::Corrupt { .. }));
}

#[tokio::test]
async fn somebody_elses_database_is_left_alone() {
    let place = Place::sqlite();
    sqlx::any::install_default_drivers();
    let create = format!("{}?mode=rwc", place.url);
    let mut connection = <sqlx::AnyConnection as sqlx::Connection>::connect(&create).await.unwrap();
    sqlx::raw_sql("CREATE TABLE recipes (name TEXT)").execute(&mut connection).await.unwrap();
    let error = refused(&place.url).await;
    assert!(matches!(&error, StoreError::Foreign { table, .. } if table == "recipes"), "{error}");
    assert_eq!(place.ask("SELECT name FROM sqlite_master").await, [["recipes"]]);
}

#[tokio::test]
async fn a_folder_that_is_not_there_is_named() {
    let error = refused("sqlite:///no/such/folder/bindery.db").await;
    assert!(matches!(&error, StoreError::Unreachable { .. }) && error.hint().contains("folder"), "{error}");
}

#[tokio::test]
async fn a_server_that_is_not_there_is_named_without_its_password() {
    // A port that was free a moment ago and that nobody listens on.
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let url = format!("postgres://bindery:s3cret@127.0.0.1:{port}/bindery");
    let error = Store::open(options(&url)).await.err().unwrap();
    let text = format!("{error} {error:?}");
    assert!(matches!(error, StoreError::Unreachable { .. }), "{text}");
    assert!(text.contains(&format!("bindery:***@127.0.0.1:{port}")) && !text.contains("s3cret"), "{text}");
}

#[tokio::test]
async fn a_store_opened_to_be_read_answers_and_takes_nothing() {
    let place = Place::sqlite();
    with_tables(&place, "SELECT 1").await;
    let (store, _thread) = Store::open(options(&format!("{}?mode=ro", place.url))).await.unwrap();
    assert!(table::list(&store).await.unwrap().is_empty());
    let new = NewKey { tenant: tenant("acme"), name: String::new(), expires_at: None, grant: KeyGrant::default() };
    let error = table::create(&store, new, UnixMillis(0)).await.unwrap_err();
    assert!(matches!(error, KeyError::Store(StoreError::ReadOnly { .. })), "{error:?}");
}

#[cfg(unix)]
#[tokio::test]
async fn the_file_is_its_owners_alone() {
    use std::os::unix::fs::PermissionsExt as _;
    let place = Place::sqlite();
    let (_store, _thread) = place.open().await;
    for file in ["bindery.db", "bindery.db-wal"] {
        let mode = std::fs::metadata(place.path().with_file_name(file)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{file}");
    }
}

#[tokio::test]
async fn a_path_is_a_path_whatever_is_in_it() {
    let folder = tempfile::tempdir().unwrap();
    for name in ["My Store.db", "50%25.db", "ünïcode.db", "a+b&c=d.db"] {
        let url = format!("sqlite://{}/{name}", folder.path().display());
        assert!(StoreUrl::from_str(&url).is_ok());
        drop(Store::open(options(&url)).await.unwrap());
        assert!(folder.path().join(name).metadata().unwrap().len() > 0, "{name}");
    }
}

/// A new file, and another's connection that writes it.
async fn written_by_another() -> (Place, sqlx::AnyConnection) {
    let place = Place::sqlite();
    std::fs::File::create(place.path()).unwrap();
    let mut other = place.connect().await;
    sqlx::raw_sql("BEGIN IMMEDIATE").execute(&mut other).await.unwrap();
    (place, other)
}

/// SQLite refuses at once, without the wait it was told, to change the journal of a file that another process writes.
#[tokio::test]
async fn a_file_that_another_process_writes_is_waited_for_when_it_is_opened() {
    let (place, mut other) = written_by_another().await;
    let opened = tokio::spawn(Store::open(place.options()));
    tokio::time::sleep(std::time::Duration::from_millis(200)).await;
    assert!(!opened.is_finished(), "{:?}", opened.await.unwrap().err());
    sqlx::raw_sql("COMMIT").execute(&mut other).await.unwrap();
    drop(opened.await.unwrap().unwrap());

    let (place, _other) = written_by_another().await;
    let mut options = place.options();
    options.timeout = std::time::Duration::from_millis(300);
    let error = Store::open(options).await.err().unwrap();
    assert!(matches!(error, StoreError::Busy { .. }), "{error:?}");
}

/// Both find no schema and make one; neither fails.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn processes_that_start_at_once_make_one_schema() {
    let places = [Some(Place::sqlite()), Place::postgres().await];
    for place in places.iter().flatten() {
        let open = |_| tokio::spawn(Store::open(place.options()));
        for opened in futures::future::join_all((0..8).map(open)).await {
            drop(opened.unwrap().unwrap());
        }
        assert_eq!(place.ask("SELECT version FROM bindery_schema").await, [["1"], ["2"], ["3"], ["4"], ["5"], ["6"]]);
    }
}
