from posepress.model import Model as Model
from posepress.model import load as load
