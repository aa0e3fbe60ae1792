"""Who is told of an alert, and how does it reach them?"""

from tracker.delivery.metrics import PrometheusSink as PrometheusSink
from tracker.delivery.receivers import AppriseReceiver as AppriseReceiver
from tracker.delivery.receivers import Receiver as Receiver
from tracker.delivery.receivers import WebhookReceiver as WebhookReceiver
from tracker.delivery.sink import DeliverySink as DeliverySink
