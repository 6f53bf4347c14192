from allauth.account.views import SignupView
from django.conf import settings
from django.contrib import admin
from django.urls import include, path, re_path
from django.views.generic import RedirectView

import accounts.views
import ai_ops.own_data_views
import ai_ops.usage_views
import ai_ops.views
import billing.views.live
import billing.views.settings
from accounts.permissions import may_enter_django_admin, superadmin_required
from billing import dashboard
from billing.views import history, notifications, team, tokens, webhook
from postmate.api import api_urls, docs_urlpatterns
from postmate.web import views

# Django admin has no sign-in of its own, which would know neither the limit on guesses nor the second factor.
admin.site.login = superadmin_required(admin.site.login)  # type: ignore[method-assign]
admin.site.has_permission = may_enter_django_admin  # type: ignore[method-assign]
# Nor a page for a new password, which would send no notice and end no keys.
admin.site.password_change = RedirectView.as_view(pattern_name="account_change_password")  # type: ignore[assignment, method-assign]
admin.site.site_header = admin.site.site_title = "Postmate token billing"
if settings.REHEARSAL:
    admin.site.site_header += ", a rehearsal: no real money moves here"

studio_urls = [
    path("", ai_ops.views.home, name="home"),
    path("quote/<slug:name>/", ai_ops.views.quote, name="quote"),
    path("outcome/", ai_ops.views.outcome, name="outcome"),
    path("projects/", ai_ops.views.projects, name="projects"),
    path("projects/<int:pk>/", ai_ops.views.project, name="project"),
    path("content/<int:pk>/", ai_ops.views.content, name="content"),
    path("content/<int:pk>/save/", ai_ops.views.save_content, name="save-content"),
    path("content/<int:pk>/versions/<int:number>/", ai_ops.views.version, name="version"),
    path("content/<int:pk>/versions/<int:number>/restore/", ai_ops.views.restore, name="restore"),
    path("chats/", ai_ops.views.chats, name="chats"),
    path("chats/<int:pk>/", ai_ops.views.chat, name="chat"),
    path("images/", ai_ops.views.images, name="images"),
    path("images/<int:pk>/", ai_ops.views.image_batch, name="image-batch"),
    path("images/files/<int:pk>/", ai_ops.views.image_file, name="image-file"),
]

tokens_urls = [
    path("", tokens.home, name="home"),
    path("balance/", tokens.balance, name="balance"),
    path("price/", tokens.price, name="price"),
    path("checkout/", tokens.checkout, name="checkout"),
    path("success/<int:pk>/", tokens.success, name="success"),
    path("receipts/<int:pk>.pdf", tokens.receipt, name="receipt"),
    path("cancelled/<int:pk>/", tokens.cancelled, name="cancelled"),
    path("auto-recharge/", tokens.auto_recharge, name="auto-recharge"),
    path("card/", tokens.card, name="card"),
    path("history/", history.home, name="history"),
    path("export.csv", history.export, name="export"),
    path("statements/", history.statement_list, name="statements"),
    re_path(r"^statements/(?P<year>[0-9]{4})-(?P<month>[0-9]{2})\.pdf$", history.statement, name="statement"),
    path("confirm/<int:pk>/", tokens.confirm, name="confirm"),
    path("usage/", ai_ops.usage_views.usage, name="usage"),
    path("usage/log/", ai_ops.usage_views.usage_log, name="usage-log"),
    path("usage/<int:pk>/", ai_ops.usage_views.usage_entry, name="usage-entry"),
    path("notifications/", notifications.home, name="notifications"),
    path("notifications/bell/", notifications.bell, name="bell"),
    path("notifications/read/", notifications.mark_all_read, name="notifications_read"),
    path("notifications/settings/", notifications.settings, name="notification_settings"),
]

team_urls = [
    path("", team.home, name="home"),
    path("new/", team.found, name="found"),
    path("switch/", team.switch, name="switch"),
    path("join/<str:token>/", team.join, name="join"),
    path("<int:workspace_id>/", team.members, name="members"),
    path("<int:workspace_id>/enter/", team.enter_team, name="enter"),
    path("<int:workspace_id>/invitations/", team.invite, name="invite"),
    path("<int:workspace_id>/invitations/<int:pk>/revoke/", team.revoke, name="revoke"),
    path("<int:workspace_id>/members/<int:user_id>/role/", team.role, name="role"),
    path("<int:workspace_id>/members/<int:user_id>/remove/", team.remove, name="remove"),
    path("<int:workspace_id>/hand-over/", team.hand_over, name="hand-over"),
    path("<int:workspace_id>/settings/", team.settings, name="settings"),
    path("<int:workspace_id>/close/", team.close, name="close"),
]

# Above Django admin, whose prefix it shares.
dashboard_urls = [
    path("", dashboard.figures.home, name="home"),
    path("sections/<slug:name>/", dashboard.figures.section, name="section"),
    path("sections/<slug:name>.csv", dashboard.figures.export, name="figures-export"),
    path("sections/<slug:name>.pdf", dashboard.figures.export_pdf, name="figures-pdf"),
    path("purchases/<int:pk>/", dashboard.payments.purchase, name="purchase"),
    path("drifts/", dashboard.payments.drifts, name="drifts"),
    path("drifts/<int:pk>/", dashboard.payments.resolve_drift, name="resolve-drift"),
    path("accounts/", dashboard.accounts.account_list, name="accounts"),
    path("accounts/<int:user_id>/", dashboard.accounts.account, name="account"),
    path("accounts/<int:user_id>/status/", dashboard.accounts.account_status, name="account-status"),
    path("accounts/<int:user_id>/welcome-bonus/", dashboard.accounts.give_bonus, name="give-bonus"),
    path("teams/<int:account_id>/", dashboard.accounts.account, name="team-account"),
    path("teams/<int:account_id>/status/", dashboard.accounts.account_status, name="team-account-status"),
    path("grants/new/", dashboard.grants.new_grant, name="new-grant"),
    path("events/", dashboard.payments.events, name="events"),
    path("events/<int:pk>/", dashboard.payments.handle_event, name="handle-event"),
    path("bulk/", dashboard.bulk.job_list, name="bulk-jobs"),
    path("bulk/new/", dashboard.bulk.new_job, name="new-bulk-job"),
    path("bulk/<int:pk>/", dashboard.bulk.job, name="bulk-job"),
    path("bulk/<int:pk>.csv", dashboard.bulk.job_export, name="bulk-job-export"),
    path("requests/", dashboard.grants.request_list, name="requests"),
    path("requests/<int:pk>/", dashboard.grants.decide_request, name="decide-request"),
    path("requests/changes/<int:pk>/", dashboard.grants.decide_change, name="decide-change"),
    path("audit/", dashboard.audit_log.audit_log, name="audit"),
    path("settings/", dashboard.settings.settings, name="settings"),
    path("finance/", dashboard.finance.home, name="finance"),
    re_path(
        r"^finance/postmate-(?P<day>[0-9]{4}-[0-9]{2}-[0-9]{2})\.zip$", dashboard.finance.file, name="finance-file"
    ),
]

# All that holds a connection open. In production the proxy sends this prefix to the `live` process.
live_urls = [
    path("balance/", billing.views.live.balance, name="balance"),
    path("<slug:name>/", ai_ops.views.operate, name="operate"),
]

urlpatterns = [
    path("", views.home, name="home"),
    # The page names the bonus of today: a template calls what can be called.
    path("accounts/signup/", SignupView.as_view(extra_context={"welcome_bonus_tokens": views.welcome_bonus_tokens})),
    path("accounts/settings/", billing.views.settings.profile, name="settings"),
    path("accounts/data/", ai_ops.own_data_views.data, name="data"),
    path("accounts/data/download/", ai_ops.own_data_views.download, name="data-download"),
    path("accounts/anonymise/", ai_ops.own_data_views.anonymise, name="anonymise"),
    path("accounts/api-keys/", accounts.views.keys, name="api-keys"),
    path("accounts/api-keys/<int:pk>/revoke/", accounts.views.revoke_key, name="api-key-revoke"),
    re_path(
        r"accounts/password/reset/key/(?P<uidb36>[0-9A-Za-z]+)-(?P<key>.+)/$",
        accounts.views.ResetFromKeyView.as_view(),
    ),
    path("accounts/", include("allauth.urls")),
    path("studio/", include((studio_urls, "studio"))),
    path("tokens/", include((tokens_urls, "tokens"))),
    path("team/", include((team_urls, "team"))),
    path("live/", include((live_urls, "live"))),
    path("stripe/webhook/", webhook.stripe_webhook, name="stripe-webhook"),
    path("api/v1/", api_urls),
    path("api/", include(docs_urlpatterns)),
    path("admin/tokens/", include((dashboard_urls, "dashboard"))),
    path("admin/", admin.site.urls),
    path("healthz", views.healthz, name="healthz"),
    path("readyz", views.readyz, name="readyz"),
    path("metrics", views.prometheus_metrics, name="metrics"),
    path("dev/mails/", views.mails, name="mails"),
    path("dev/mails/<str:file>/<int:number>/", views.mail, name="mail"),
    path("dev/mails/<str:file>/<int:number>/html/", views.mail_html, name="mail-html"),
]
