//! `bindery keys create|list|revoke|rotate`: tenants' keys in the store, which running servers watch.
//!
//! A key goes to stdout alone, so that a script can take it; whatever is said of it goes to stderr. Invariant: a key in
//! the clear is printed where it was made, and nowhere else.

use bindery_gateway::{
    clock::UnixMillis,
    keys::{
        ApiKey, KeyError, KeyGrant, KeyInfo, NewKey, Rotation,
        table::{create, list, revoke, rotate},
    },
    limits::RateLimits,
    names::KeyId,
    store::Store,
};

use crate::{
    args::{KeyCreateArgs, KeyRotateArgs, KeysAction, KeysArgs},
    commands::models::{plain_table, show},
    failure::Failure,
    gateway::{ConfigFile, of_store},
    terminal::{self, thousands},
};

pub(crate) async fn run(args: KeysArgs) -> anyhow::Result<()> {
    let KeysArgs { action, config } = args;
    let file = ConfigFile::read(config)?;
    // Before a store is made for it.
    if let KeysAction::Create(create) = &action {
        file.tenant(&create.tenant)?;
    }
    let open = match &action {
        KeysAction::Create(_) => file.open_store().await?,
        // Without a store there is nothing to list, to end or to replace.
        KeysAction::List { .. } | KeysAction::Revoke { .. } | KeysAction::Rotate(_) => {
            file.open_store_to_read().await?
        }
    };
    let done = act(&file, &open.store, action).await;
    open.close().await?;
    done
}

async fn act(file: &ConfigFile, store: &Store, action: KeysAction) -> anyhow::Result<()> {
    match action {
        KeysAction::Create(args) => make(file, store, args).await,
        KeysAction::List { json } => show_all(file, store, Form::of(json)).await,
        KeysAction::Revoke { id } => end(store, &id).await,
        KeysAction::Rotate(args) => replace(store, args).await,
    }
}

#[derive(Clone, Copy)]
enum Form {
    Table,
    Json,
}

impl Form {
    fn of(json: bool) -> Self {
        if json { Self::Json } else { Self::Table }
    }
}

async fn make(file: &ConfigFile, store: &Store, args: KeyCreateArgs) -> anyhow::Result<()> {
    let grant = grant(&args);
    let KeyCreateArgs { tenant, name, expires, .. } = args;
    let now = UnixMillis::now();
    let expires_at = expires.map(|expires| now.after(expires));
    let new = NewKey { tenant: file.tenant(&tenant)?.id.clone(), name, expires_at, grant };
    let key = create(store, new, now).await.map_err(of_key)?;
    terminal::note(&format!("the key {} of the tenant {tenant}, shown this once; {}", key.id(), until(expires_at)));
    print_key(&key)
}

/// What the key may use beside what the tenant may.
fn grant(args: &KeyCreateArgs) -> KeyGrant {
    let list = |names: &Vec<String>| (!names.is_empty()).then(|| names.clone());
    KeyGrant {
        limits: RateLimits {
            requests_per_minute: args.requests_per_minute,
            tokens_per_minute: args.tokens_per_minute,
            concurrent: args.concurrent,
        },
        models: list(&args.models),
        adapters: list(&args.adapters),
    }
}

async fn replace(store: &Store, args: KeyRotateArgs) -> anyhow::Result<()> {
    let KeyRotateArgs { id, overlap, expires } = args;
    let now = UnixMillis::now();
    let expires_at = expires.map(|expires| now.after(expires));
    let rotation = Rotation { id: key_id(&id)?, overlap, expires_at };
    let key = rotate(store, rotation, now).await.map_err(of_key)?;
    terminal::note(&format!("the key {} takes the place of {id}, shown this once; {}", key.id(), until(expires_at)));
    terminal::note(&format!("the old key opens until {} at the latest", now.after(overlap)));
    print_key(&key)
}

async fn end(store: &Store, id: &str) -> anyhow::Result<()> {
    let now = UnixMillis::now();
    let at = revoke(store, &key_id(id)?, now).await.map_err(of_key)?;
    terminal::note(&if at < now {
        format!("the key {id} was revoked at {at} already")
    } else {
        format!("the key {id} is revoked; running servers refuse it within a second")
    });
    Ok(())
}

async fn show_all(file: &ConfigFile, store: &Store, form: Form) -> anyhow::Result<()> {
    let keys = list(store).await.map_err(of_key)?;
    let text = match form {
        Form::Json => format!("{}\n", serde_json::to_string_pretty(&keys)?),
        Form::Table => table(&keys, UnixMillis::now()),
    };
    terminal::print(&text)?;
    let is_stranger = |key: &&KeyInfo| file.tenant(&key.tenant).is_err() && key.revoked_at.is_none();
    if let Some(key) = keys.iter().find(is_stranger) {
        let KeyInfo { id, tenant, .. } = key;
        terminal::note(&format!(
            "the key {id} is of the tenant {tenant:?}, which {} does not name",
            file.path.display()
        ));
    }
    Ok(())
}

/// The key, and nothing else.
fn print_key(key: &ApiKey) -> anyhow::Result<()> {
    Ok(terminal::print(&format!("{}\n", key.expose()))?)
}

fn until(expires_at: Option<UnixMillis>) -> String {
    expires_at.map_or_else(|| "it opens until it is revoked".to_owned(), |at| format!("it opens until {at}"))
}

fn key_id(text: &str) -> Result<KeyId, Failure> {
    // A whole key is what people have at hand, and it should not stay in their shell's history.
    if text.starts_with(bindery_gateway::keys::PREFIX) {
        return Err(Failure::usage("a key's id is asked for, not the key").hint("`bindery keys list` shows the ids"));
    }
    KeyId::new(text).map_err(|error| Failure::usage(error.to_string()).hint("`bindery keys list` shows the ids"))
}

fn of_key(error: KeyError) -> Failure {
    match error {
        KeyError::Store(error) => of_store(&error),
        KeyError::BadName | KeyError::EndsBeforeItBegins | KeyError::BadList { .. } | KeyError::BadPattern { .. } => {
            Failure::usage(error.to_string())
        }
        other => Failure::new(other.to_string()),
    }
}

/// A row a key, the oldest first.
fn table(keys: &[KeyInfo], now: UnixMillis) -> String {
    if keys.is_empty() {
        return "no keys\n".to_owned();
    }
    let mut table = plain_table();
    table.set_header(["ID", "TENANT", "NAME", "CREATED", "STATE", "MAY USE"]);
    for key in keys {
        table.add_row([
            key.id.clone(),
            key.tenant.clone(),
            key.name.clone(),
            UnixMillis(key.created_at).day(),
            state(key, now),
            key.grant.as_ref().map_or_else(|| "nothing: its row was changed by hand".to_owned(), may_use),
        ]);
    }
    format!("{}\n", show(&mut table))
}

/// What its own limits and lists leave of what the tenant may.
fn may_use(grant: &KeyGrant) -> String {
    let RateLimits { requests_per_minute, tokens_per_minute, concurrent } = grant.limits;
    let limit = |limit: Option<u64>, of: &str| limit.map(|limit| format!("{} {of}", thousands(limit)));
    let list = |names: &Option<Vec<String>>, of: &str| names.as_ref().map(|names| format!("{of} {}", names.join(", ")));
    let parts = [
        limit(requests_per_minute, "requests/min"),
        limit(tokens_per_minute, "tokens/min"),
        limit(concurrent.map(u64::from), "at once"),
        list(&grant.models, "models"),
        list(&grant.adapters, "adapters"),
    ];
    let parts: Vec<String> = parts.into_iter().flatten().collect();
    if parts.is_empty() { "what the tenant may".to_owned() } else { parts.join("; ") }
}

fn state(key: &KeyInfo, now: UnixMillis) -> String {
    let replaced = key.successor.as_ref().map_or_else(String::new, |by| format!(", replaced by {by}"));
    match (key.revoked_at, key.expires_at) {
        (Some(at), _) => format!("revoked {}", UnixMillis(at).day()),
        (None, Some(at)) if at <= now.0 => format!("expired {}{replaced}", UnixMillis(at).day()),
        (None, Some(at)) => format!("opens until {}{replaced}", UnixMillis(at)),
        (None, None) => "opens".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_state_of_a_key_is_what_a_server_would_say() {
        let key = KeyInfo {
            id: "abc".into(),
            tenant: "acme".into(),
            name: String::new(),
            created_at: 0,
            expires_at: None,
            revoked_at: None,
            successor: None,
            grant: Some(KeyGrant::default()),
        };
        let now = UnixMillis(1_795_867_200_000);
        let until = |at: i64| KeyInfo { expires_at: Some(at), ..key.clone() };
        assert_eq!(state(&key, now), "opens");
        assert_eq!(state(&until(now.0), now), "expired 2026-11-28");
        assert_eq!(state(&until(now.0 + 1000), now), "opens until 2026-11-28T12:00:01Z");
        let rotated = KeyInfo { successor: Some("xyz".into()), ..until(now.0 - 1) };
        assert_eq!(state(&rotated, now), "expired 2026-11-28, replaced by xyz");
        assert_eq!(state(&KeyInfo { revoked_at: Some(0), ..until(now.0 + 1) }, now), "revoked 1970-01-01");
    }

    #[test]
    fn what_a_key_may_use_is_told_in_a_line() {
        assert_eq!(may_use(&KeyGrant::default()), "what the tenant may");
        let limits = RateLimits { requests_per_minute: Some(6000), tokens_per_minute: None, concurrent: Some(2) };
        let grant = KeyGrant { limits, models: Some(vec!["a".into(), "b*".into()]), adapters: None };
        assert_eq!(may_use(&grant), "6,000 requests/min; 2 at once; models a, b*");
    }
}
