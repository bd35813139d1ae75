//! A remote in a bucket of S3, or of anything that speaks its protocol.
//!
//! Credentials, region and endpoint come as everywhere with AWS (environment, profile, web identity,
//! container, instance), unless the location says otherwise. A service other than AWS is asked with the
//! bucket in the path, which all of them understand. What a body holds is told by digests, so the SDK's
//! own checksums, which not all services know, are sent only where S3 demands them.

use std::error::Error;
use std::future::Future;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use aws_config::retry::RetryConfig;
use aws_config::stalled_stream_protection::StalledStreamProtectionConfig;
use aws_config::timeout::TimeoutConfig;
use aws_config::{BehaviorVersion, Region};
use aws_credential_types::provider::error::CredentialsError;
use aws_sdk_s3::Client;
use aws_sdk_s3::config::http::HttpResponse;
use aws_sdk_s3::config::{RequestChecksumCalculation, ResponseChecksumValidation};
use aws_sdk_s3::error::{DisplayErrorContext, ProvideErrorMetadata, SdkError};
use aws_sdk_s3::operation::get_object::GetObjectOutput;
use aws_sdk_s3::primitives::ByteStream;
use aws_smithy_http_client::Builder;
use aws_smithy_http_client::tls::{self, rustls_provider::CryptoMode};
use bytes::{Bytes, BytesMut};

use crate::error::RemoteError;
use crate::location::S3Location;
use crate::name::{Kind, ObjectName};
use crate::{Body, Limits, Object, Put, Remote, Written};

/// How long a body may stand still before it counts as broken off.
const STALLED: Duration = Duration::from_secs(5);

/// A remote in a bucket.
#[derive(Debug)]
pub struct S3Remote {
    client: Client,
    bucket: String,
    prefix: String,
    /// For people.
    place: String,
    limits: Limits,
    /// Whether the service knows `If-None-Match`, as far as anybody has found out.
    is_conditional: AtomicBool,
}

/// An answer that is none.
struct Failure {
    /// HTTP status, where there was an answer.
    status: Option<u16>,
    /// The service's name for it.
    code: Option<String>,
    /// In words.
    reason: String,
    is_denied: bool,
}

impl S3Remote {
    /// The remote in this bucket. Asks nobody yet, except where credentials and region come from.
    pub async fn new(location: &S3Location, limits: Limits) -> Self {
        let http = Builder::new()
            .tls_provider(tls::Provider::Rustls(CryptoMode::Ring))
            .build_https();
        let timeouts = TimeoutConfig::builder()
            .connect_timeout(limits.connect)
            .operation_timeout(limits.call)
            .build();
        let mut loader = aws_config::defaults(BehaviorVersion::latest())
            .http_client(http)
            .timeout_config(timeouts)
            .retry_config(RetryConfig::standard().with_max_attempts(limits.tries))
            .stalled_stream_protection(
                StalledStreamProtectionConfig::enabled()
                    .grace_period(STALLED)
                    .build(),
            );
        if let Some(endpoint) = &location.endpoint {
            loader = loader.endpoint_url(endpoint);
        }
        if let Some(profile) = &location.profile {
            loader = loader.profile_name(profile);
        }
        if location.anonymous {
            loader = loader.no_credentials();
        }
        if let Some(region) = &location.region {
            loader = loader.region(Region::new(region.clone()));
        }
        let shared = loader.load().await;
        let mut config = aws_sdk_s3::config::Builder::from(&shared)
            .request_checksum_calculation(RequestChecksumCalculation::WhenRequired)
            .response_checksum_validation(ResponseChecksumValidation::WhenRequired)
            .force_path_style(shared.endpoint_url().is_some());
        if shared.region().is_none() {
            // Where there is an endpoint it is only part of the signature.
            config = config.region(Region::from_static("us-east-1"));
        }
        Self {
            client: Client::from_conf(config.build()),
            bucket: location.bucket.clone(),
            prefix: match location.prefix.as_str() {
                "" => String::new(),
                prefix => format!("{prefix}/"),
            },
            place: location.to_string(),
            limits,
            is_conditional: AtomicBool::new(true),
        }
    }

    fn key(&self, name: &ObjectName) -> String {
        format!("{}{name}", self.prefix)
    }

    /// Ends a call when its time is over.
    async fn in_time<T>(
        &self,
        call: impl Future<Output = Result<T, RemoteError>> + Send,
    ) -> Result<T, RemoteError> {
        // The futures of the SDK are large, and would be copied around.
        let ended = tokio::time::timeout(self.limits.call, Box::pin(call)).await;
        ended.unwrap_or_else(|_| Err(self.timed_out()))
    }

    fn timed_out(&self) -> RemoteError {
        RemoteError::TimedOut {
            place: self.place.clone(),
            limit: self.limits.call,
        }
    }

    fn error(&self, failure: Failure) -> RemoteError {
        let (place, reason) = (self.place.clone(), failure.reason);
        match failure.status {
            _ if failure.is_denied => RemoteError::Denied { place, reason },
            Some(401 | 403) => RemoteError::Denied { place, reason },
            None | Some(408 | 429 | 500..) => RemoteError::Unreachable { place, reason },
            Some(_) => RemoteError::Refused { place, reason },
        }
    }

    async fn start_get(
        &self,
        name: &ObjectName,
        range: Option<&Range<u64>>,
    ) -> Result<Option<GetObjectOutput>, RemoteError> {
        let range = range.map(|range| format!("bytes={}-{}", range.start, range.end - 1));
        let sent = self
            .client
            .get_object()
            .bucket(&self.bucket)
            .key(self.key(name))
            .set_range(range)
            .send()
            .await;
        match sent.map_err(|error| Failure::of(&error)) {
            Ok(object) => Ok(Some(object)),
            Err(failure) if failure.is_absent() => Ok(None),
            Err(failure) => Err(self.error(failure)),
        }
    }

    async fn read_body(
        &self,
        name: &ObjectName,
        object: GetObjectOutput,
        most: u64,
    ) -> Result<Bytes, RemoteError> {
        let too_large = || RemoteError::TooLarge {
            name: name.clone(),
            most,
        };
        let length = object
            .content_length()
            .and_then(|length| u64::try_from(length).ok());
        if length.is_some_and(|length| length > most) {
            return Err(too_large());
        }
        let mut bytes = BytesMut::new();
        let mut body = object.body;
        while let Some(part) = body.next().await {
            let part = part.map_err(|error| RemoteError::Unreachable {
                place: self.place.clone(),
                reason: DisplayErrorContext(error).to_string(),
            })?;
            if (bytes.len() + part.len()) as u64 > most {
                return Err(too_large());
            }
            bytes.extend_from_slice(&part);
        }
        if length.is_some_and(|length| length != bytes.len() as u64) {
            return Err(RemoteError::Unreachable {
                place: self.place.clone(),
                reason: format!("the body of {name} was cut short"),
            });
        }
        Ok(bytes.freeze())
    }

    async fn put_once(
        &self,
        name: &ObjectName,
        body: &Body,
        is_conditional: bool,
    ) -> Result<Written, Failure> {
        let body = match body {
            Body::Bytes(bytes) => ByteStream::from(bytes.clone()),
            Body::File(path) => ByteStream::from_path(path).await.map_err(|error| Failure {
                status: None,
                code: None,
                reason: error.to_string(),
                is_denied: false,
            })?,
        };
        let sent = self
            .client
            .put_object()
            .bucket(&self.bucket)
            .key(self.key(name))
            .set_if_none_match(is_conditional.then(|| "*".to_owned()))
            .body(body)
            .send()
            .await;
        match sent.map_err(|error| Failure::of(&error)) {
            Ok(_) => Ok(Written::New),
            // Somebody else is writing it, or has.
            Err(failure) if is_conditional && matches!(failure.status, Some(409 | 412)) => {
                Ok(Written::Existed)
            }
            Err(failure) => Err(failure),
        }
    }

    async fn put_if_absent(&self, name: &ObjectName, body: &Body) -> Result<Written, RemoteError> {
        if self.is_conditional.load(Ordering::Relaxed) {
            match self.put_once(name, body, true).await {
                Err(failure) if failure.status == Some(501) => {
                    self.is_conditional.store(false, Ordering::Relaxed);
                }
                result => return result.map_err(|failure| self.error(failure)),
            }
        }
        if self.look(name).await?.is_some() {
            return Ok(Written::Existed);
        }
        let written = self.put_once(name, body, false).await;
        written.map_err(|failure| self.error(failure))
    }

    async fn look(&self, name: &ObjectName) -> Result<Option<Object>, RemoteError> {
        let request = self
            .client
            .head_object()
            .bucket(&self.bucket)
            .key(self.key(name));
        match request.send().await.map_err(|error| Failure::of(&error)) {
            Ok(found) => Ok(Some(Object {
                name: name.clone(),
                size: size(found.content_length()),
                modified: time(found.last_modified()),
            })),
            Err(failure) if failure.is_absent() => Ok(None),
            Err(failure) => Err(self.error(failure)),
        }
    }

    /// One page, and where the next one starts.
    async fn page(
        &self,
        prefix: &str,
        after: &str,
    ) -> Result<(Vec<Object>, Option<String>), RemoteError> {
        let request = self
            .client
            .list_objects_v2()
            .bucket(&self.bucket)
            .prefix(prefix);
        let listed = request.start_after(after).send().await;
        let listed = listed.map_err(|error| self.error(Failure::of(&error)))?;
        let contents = listed.contents();
        let objects = contents.iter().filter_map(|object| {
            let name = object.key()?.strip_prefix(&self.prefix)?.parse().ok()?;
            Some(Object {
                name,
                size: size(object.size()),
                modified: time(object.last_modified()),
            })
        });
        let is_last = !listed.is_truncated().unwrap_or_default();
        let last = contents.last().and_then(|object| object.key());
        let next = last
            .filter(|last| !is_last && *last > after)
            .map(str::to_owned);
        Ok((objects.collect(), next))
    }
}

#[async_trait]
impl Remote for S3Remote {
    async fn get(
        &self,
        name: &ObjectName,
        range: Option<Range<u64>>,
        most: u64,
    ) -> Result<Option<Bytes>, RemoteError> {
        if range.as_ref().is_some_and(Range::is_empty) {
            return Ok(Some(Bytes::new()));
        }
        self.in_time(async {
            let mut tries = 0..self.limits.tries.max(1);
            loop {
                tries.next();
                let Some(object) = self.start_get(name, range.as_ref()).await? else {
                    return Ok(None);
                };
                match self.read_body(name, object, most).await {
                    // The SDK tries again what has not begun.
                    Err(error) if error.is_passing() && !tries.is_empty() => {}
                    result => return result.map(Some),
                }
            }
        })
        .await
    }

    async fn put(&self, name: &ObjectName, body: Body, mode: Put) -> Result<Written, RemoteError> {
        self.in_time(async {
            match mode {
                Put::IfAbsent => self.put_if_absent(name, &body).await,
                Put::Replace => {
                    let written = self.put_once(name, &body, false).await;
                    written.map_err(|failure| self.error(failure))
                }
            }
        })
        .await
    }

    async fn head(&self, name: &ObjectName) -> Result<Option<Object>, RemoteError> {
        self.in_time(self.look(name)).await
    }

    async fn list(
        &self,
        kind: Kind,
        after: Option<&ObjectName>,
    ) -> Result<Vec<Object>, RemoteError> {
        self.in_time(async {
            let prefix = format!("{}{}", self.prefix, kind.prefix());
            let mut after = after.map_or_else(|| prefix.clone(), |name| self.key(name));
            loop {
                let (objects, next) = self.page(&prefix, &after).await?;
                match next {
                    // A page of names that are none is not the end.
                    Some(next) if objects.is_empty() => after = next,
                    _ => return Ok(objects),
                }
            }
        })
        .await
    }

    async fn delete(&self, name: &ObjectName) -> Result<(), RemoteError> {
        self.in_time(async {
            let request = self
                .client
                .delete_object()
                .bucket(&self.bucket)
                .key(self.key(name));
            match request.send().await.map_err(|error| Failure::of(&error)) {
                Err(failure) if !failure.is_absent() => Err(self.error(failure)),
                _ => Ok(()),
            }
        })
        .await
    }
}

impl Failure {
    fn of<E>(error: &SdkError<E, HttpResponse>) -> Self
    where
        E: ProvideErrorMetadata + Error + Send + Sync + 'static,
    {
        let status = error
            .raw_response()
            .map(|response| response.status().as_u16());
        let code = error.code().map(str::to_owned);
        let message = error.message().map(str::to_owned);
        let is_denied = sources(error).any(<dyn Error>::is::<CredentialsError>);
        let reason = match (&code, message) {
            (Some(code), Some(message)) => format!("{code}: {message}"),
            (Some(code), None) => code.clone(),
            _ => match status {
                Some(status) => format!("HTTP status {status}"),
                None => innermost(error),
            },
        };
        // The chain of credentials tells each of its links in a line of its own.
        let reason = reason.split_whitespace().collect::<Vec<_>>().join(" ");
        Self {
            status,
            code,
            reason,
            is_denied,
        }
    }

    /// Whether it says that there is no such object.
    fn is_absent(&self) -> bool {
        // Without a code it is the answer to HEAD, which has no body to tell it in.
        self.status == Some(404)
            && matches!(self.code.as_deref(), None | Some("NoSuchKey" | "NotFound"))
    }
}

/// What it comes down to: `connection refused` says more than that dispatching failed.
fn innermost(error: &(dyn Error + 'static)) -> String {
    sources(error)
        .last()
        .map(ToString::to_string)
        .unwrap_or_default()
}

fn sources<'a>(
    error: &'a (dyn Error + 'static),
) -> impl Iterator<Item = &'a (dyn Error + 'static)> {
    std::iter::successors(Some(error), |error: &&'a (dyn Error + 'static)| {
        (*error).source()
    })
}

fn size(length: Option<i64>) -> u64 {
    length
        .and_then(|length| u64::try_from(length).ok())
        .unwrap_or_default()
}

fn time(modified: Option<&aws_sdk_s3::primitives::DateTime>) -> SystemTime {
    let seconds = modified.and_then(|time| u64::try_from(time.secs()).ok());
    SystemTime::UNIX_EPOCH + Duration::from_secs(seconds.unwrap_or_default())
}
